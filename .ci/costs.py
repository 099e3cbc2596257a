"""Reads what pytest printed: which files took longest, or with --total how many tests there were.

Files take their time from the lines of ``--durations``, summed over setup, call and teardown.
"""

import collections
import pathlib
import re
import sys

paths = [argument for argument in sys.argv[1:] if argument != "--total"]
texts = [pathlib.Path(path).read_text() for path in paths]
if "--total" in sys.argv:
    summaries = [re.findall(r"^=* ?(.*\d+ passed.*?) in [\d.]+s", text, re.M)[-1] for text in texts]
    counts: collections.Counter[str] = collections.Counter()
    for summary in summaries:
        for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary):
            counts[word] += int(number)
    print(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed")
else:
    seconds: collections.Counter[str] = collections.Counter()
    for text in texts:
        for time, name in re.findall(r"^([\d.]+)s (?:setup|call|teardown) +(\S+)", text, re.M):
            seconds[name.partition("::")[0]] += float(time)
    for name, total in seconds.most_common(10):
        print(f"{total:7.1f} s  {name}")
