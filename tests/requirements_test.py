#!/usr/bin/env python3
"""The requirement files, and what perf/cpu_system.py installs, pin one version of every package: a Python
that has all of them runs every test. tests/golden's is an older Python environment of its own.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("tools/requirements.txt", "tests/requirements.txt", "tools/serve_torch/requirements.txt",
         "perf/cpu_system.py")

pins = {}
for file in FILES:
    found = re.findall(r'(?:^|")([A-Za-z0-9_-]+)==([0-9.]+)', (ROOT / file).read_text(), re.M)
    assert found, f"{file} pins nothing"
    for package, version in found:
        pins.setdefault(package.lower().replace("_", "-"), {}).setdefault(version, file)
differ = {package: versions for package, versions in pins.items() if len(versions) > 1}
assert not differ, differ
print(f"{len(pins)} packages, one version of each")
