"""Checks that a wheel holds the package and nothing else, and that its links are absolute."""

import re
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
names = wheel.namelist()
stray = [name for name in names if not name.startswith("jaxjd/") and ".dist-info/" not in name]
if stray or "jaxjd/py.typed" not in names:
    sys.exit(f"stray files {stray}, py.typed {'jaxjd/py.typed' in names}")
(metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
targets = re.findall(r"\]\(([^)]*)\)", wheel.read(metadata).decode())
broken = [target for target in targets if not target.startswith("https://")]
if broken or not targets:
    sys.exit(f"links that lead nowhere on PyPI: {broken or 'no link at all'}")
print(f"{len(names)} files, {len(targets)} links, all absolute")
