"""The properties of checks/test_fuzz.py, each on many examples."""

import os


def attack(ledger, place, short):
    os.environ["FUZZ_EXAMPLES"] = "10" if short else "200"
    from checks import test_fuzz

    for function in (getattr(test_fuzz, name) for name in dir(test_fuzz) if name.startswith("test_")):
        inner, tried, problem = function.hypothesis.inner_test, [0], ""

        def counted(*args, inner=inner, tried=tried, **more):
            tried[0] += 1
            return inner(*args, **more)

        function.hypothesis.inner_test = counted
        try:
            function()
        except Exception as error:  # noqa: BLE001 - any failure of a property is a loss
            problem = f"{function.__name__}: {type(error).__name__} {error}"[:500]
        for i in range(max(1, tried[0])):
            ledger.add("fuzz", function.case, problem if i == 0 else "")
