"""What the wheel holds."""

import re
import subprocess
from importlib.metadata import distribution

from loopguard_emit import _native


def test_readelf_lists_the_five_probes() -> None:
    notes = subprocess.run(["readelf", "-nW", _native.__file__], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"Provider: (\w+)", notes) == ["loopguard"] * 5
    assert sorted(re.findall(r"Name: (\w+)", notes)) == [
        "request__end",
        "request__enter",
        "request__exit",
        "request__route",
        "request__start",
    ]
    arguments = sorted(len(found.split()) for found in re.findall(r"Arguments: (.*)", notes))
    assert arguments == [1, 1, 2, 3, 7]
    sites = [int(site, 16) for site in re.findall(r"Location: (0x[0-9a-f]+)", notes)]
    assert all(site % 8 == 0 for site in sites)


def test_no_console_scripts() -> None:
    entry_points = distribution("loopguard-emit").entry_points
    assert {entry_point.group for entry_point in entry_points} == {"pytest11"}


def test_it_is_typed_and_built_for_every_python() -> None:
    files = {str(file) for file in distribution("loopguard-emit").files or ()}
    assert {"loopguard_emit/py.typed", "loopguard_emit/_native.pyi", "loopguard_emit/_native.abi3.so"} <= files
