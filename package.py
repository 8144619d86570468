"""The zip that Codabench takes: masks of the test images, and run.py with the checkpoint that makes them.

python package.py --name a                             # runs/a/submission-test.zip
python package.py --phase dev --views flip,scales      # masks alone, of the release or the best run

run.py is one file joined from this project's sources. The masks are made by it, and the zip is proven before it is put
in its place: check_submission.py judges it and runs run.py on some images once more, in an empty folder.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import checkpoint
from atomic import atomic
from check_submission import ISOLATED, judge, show
from data import resolve
from errors import ArgumentParser, UserError, run_main
from images import image_files
from parameters import PARAM_LIMIT, count_parameters
from rundir import data_of, find_run, find_weights
from synth import MARKER
from views import parse_views

HERE = Path(__file__).parent
# In an order in which each stands below what it imports.
MODULES = (
    "terminal", "errors", "atomic", "labels", "images",
    "views", "dropout", "model", "checkpoint", "predict", "solution",
)  # fmt: skip
HEADER = '''"""The mask of a face image: one of 19 labels (CelebAMask-HQ) for every pixel.

    python3 run.py --input IMAGE.jpg --output MASK.png --weights ckpt.pth
    python3 run.py --input IMAGES --output MASKS --weights ckpt.pth

Needs what requirements.txt names and nothing else. package.py joined it from the sources named below.
"""
'''


def bound(node):
    """The names a top-level statement defines: of a function, a class or a plain assignment."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        names = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        return {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return set()


def used(nodes):
    """All names that syntax trees hold."""
    return {name.id for node in nodes for name in ast.walk(node) if isinstance(name, ast.Name)}


def join_sources(folder=HERE):
    """The text of run.py: of MODULES what solution.main() reaches, with the imports it needs.

    ValueError where that is not possible: a name of two modules, a needed file outside MODULES, an import of a module
    of ours other than `from module import name`.
    """
    statements, imports = _read_modules(folder)
    kept, needed = _reached(statements)
    defined = [name for _, node, _ in kept for name in sorted(bound(node))]
    if twice := {name for name in defined if defined.count(name) > 1}:
        raise ValueError(f"defined in two of the joined modules: {', '.join(sorted(twice))}")
    lines = _import_lines(imports, needed, defined, folder)
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    text = [HEADER, *standard, "", *(line for line in lines if line not in standard)]
    last = None
    for module, node, code in kept:
        if module != last:
            gap = "\n\n" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
            code, last = f"\n\n# {module}.py{gap}\n{code.lstrip()}", module
        text.append(code)
    return "\n".join([*text, "", "", 'if __name__ == "__main__":', "    run_main(main)", ""])


def _read_modules(folder):
    """The statements of MODULES as (module, node, text), and their imports as (module, source or None, alias)."""
    statements, imports = [], []
    for module in MODULES:
        source = Path(folder, f"{module}.py").read_text(encoding="utf-8")
        lines, tree, end = source.splitlines(), ast.parse(source), 0
        for node in tree.body:
            # From the end of the statement before, so that a comment stays above what it explains.
            start, end = end, node.end_lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports += [(module, getattr(node, "module", None), alias) for alias in node.names]
            elif not (node is tree.body[0] and ast.get_docstring(tree)) and not (
                isinstance(node, ast.If) and "__name__" in used([node.test])
            ):
                statements.append((module, node, "\n".join(lines[start:end])))
    return statements, imports


def _reached(statements):
    """The statements that solution.main() needs, and all names that it and they use."""
    kept, needed = [], {"main", "run_main"}
    while True:
        # Only the entry point's main(): those of the other scripts are commands of their own.
        now = [
            (module, node, text)
            for module, node, text in statements
            if not bound(node) or bound(node) & needed and (module == MODULES[-1] or bound(node) != {"main"})
        ]
        if len(now) == len(kept):
            return kept, needed
        kept, needed = now, needed | used(node for _, node, _ in now)


def _import_lines(imports, needed, defined, folder):
    """Import statements, sorted, of the needed names that the joined modules take from elsewhere."""
    plain, grouped = set(), defaultdict(set)
    for module, source, alias in imports:
        name, origin = alias.asname or alias.name.split(".")[0], source or alias.name
        if name not in needed:
            continue
        if Path(folder, f"{origin}.py").is_file():
            if origin not in MODULES or source is None or alias.asname:
                raise ValueError(f"{module}.py needs {name} of {origin}.py, which run.py cannot join as it is imported")
        elif name in defined:
            raise ValueError(f"{module}.py imports {name}, which another joined module defines")
        elif source:
            grouped[source].add(ast.unparse(alias))
        else:
            plain.add(ast.unparse(alias))
    lines = [f"import {name}" for name in sorted(plain)]
    return lines + [f"from {source} import {', '.join(sorted(names))}" for source, names in sorted(grouped.items())]


def write_zip(path, entries):
    """Write {name in the zip: bytes} sorted, with a fixed date, so that the same contents are the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(entries.items()):
            info = zipfile.ZipInfo(name)  # dated 1980-01-01
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)


def predict(solution, images, masks):
    """The masks of a folder of images, by the run.py of the folder `solution`; UserError where it fails."""
    command = [sys.executable, *ISOLATED, "run.py", "--weights", "ckpt.pth", "--input", images, "--output", masks]
    if subprocess.run([str(part) for part in command], cwd=solution).returncode:
        raise UserError(f"run.py could not predict {images}, as said above; nothing was written")


def make_submission(weights, images, phase, target, views=None, run=5):
    """Write the zip of a phase (test, dev) to `target` and prove it; 0, or 1 and no zip where the proof failed.

    `views` None takes those the checkpoint names. UserError for too many parameters or what cannot be read or written.
    """
    content = checkpoint.load(weights)
    parameters = count_parameters(checkpoint.restore(content, weights))
    if parameters >= PARAM_LIMIT:
        raise UserError(f"{weights} has {parameters:,} parameters; a submission must have fewer than {PARAM_LIMIT:,}")
    views = content.get("views", "") if views is None else views
    parse_views(views)
    images, target = Path(images).resolve(), Path(target)
    files = image_files(images)
    with tempfile.TemporaryDirectory(prefix="submission-") as folder:
        solution, masks, made = Path(folder, "solution"), Path(folder, "masks"), Path(folder, "made.zip")
        solution.mkdir()
        kept = {key: content[key] for key in ("model", "model_args", "size")}
        checkpoint.save(solution / "ckpt.pth", {**kept, "views": views, "state_dict": dict(content["state_dict"])})
        (solution / "run.py").write_text(join_sources(), encoding="utf-8")
        shutil.copy(HERE / "requirements.txt", solution)
        predict(solution, images, masks)
        parts = [masks] if phase == "dev" else [masks, solution]
        write_zip(made, {f"{part.name}/{path.name}": path.read_bytes() for part in parts for path in part.iterdir()})
        findings = judge(made, images, phase, run)
        if show(findings):
            print(f"{target} was not written: the proof of it failed", file=sys.stderr)
            return 1
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make folder {target.parent}: {error.strerror}; see --zip") from None
        with atomic(target) as temporary:
            shutil.copyfile(made, temporary)
    size = target.stat().st_size / 1e6
    of = " of drawn faces" if (images.parent.parent / MARKER).is_file() else ""
    print(f"{target}: {len(files)} masks{of}, {parameters:,} parameters, views {views or 'none'}, {size:.1f} MB")
    return 0


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--name", help="run to hand in; default the release, else the best run")
    parser.add_argument("--weights", help="checkpoint, instead of the run's best.pt")
    parser.add_argument("--data", help="folder with test/ and dev/; default its training's, ./data, drawn faces")
    parser.add_argument("--phase", choices=("test", "dev"), default="test", help="dev: masks alone")
    parser.add_argument("--zip", help="zip to write; default submission-PHASE.zip in the run's folder, else in build")
    parser.add_argument("--views", help="views to average, as flip,scales; default those the checkpoint names")
    parser.add_argument("--run", type=int, default=5, help="images on which run.py is proven")
    args = parser.parse_args()
    weights = find_weights(args.weights or args.name)
    folder = find_run(args.name) if args.name else weights.parent
    folder = folder if (folder / "args.json").is_file() else Path("build")
    target = Path(args.zip) if args.zip else folder / f"submission-{args.phase}.zip"
    images = resolve(data_of(weights, args.data)) / args.phase / "images"
    return make_submission(weights, images, args.phase, target, args.views, args.run)


if __name__ == "__main__":
    run_main(main)
