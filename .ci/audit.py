"""Look up known faults of the installed packages with pip-audit; exit code 1 if one of them has a
fix.

pip-audit calls a package that its service does not know "skipped", and ends well if all of them
were: an index without advisories looks like a clean bill. So a package with well-known faults is
asked about first; where those are not found, nothing can be looked up from here, which is said, and
is no failure. Words on the command line go to pip-audit (`--ignore-vuln ID`).
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

KNOWN_FAULTY = "django==1.2"


def main() -> int:
    """Print what was looked up and found."""
    reason = cannot_look_up(ask([KNOWN_FAULTY]))
    if reason is not None:
        print(f"audit: known faults could not be looked up from here ({reason}); nothing is known of the packages")
        return 0
    sentences, failed = verdict(ask(pins(distributions())))
    print("\n".join(f"audit: {sentence}" for sentence in sentences))
    return int(failed)


def pins(installed: Any) -> list[str]:
    """`name==version` of every package from an index, without what follows a + (torch's `+cpu`),
    which no index knows."""
    found = {
        f"{each.metadata['Name'].lower()}=={each.version.partition('+')[0]}"
        for each in installed
        if not _is_a_folder(each)
    }
    return sorted(found)


def _is_a_folder(distribution: Distribution) -> bool:
    return "dir_info" in json.loads(distribution.read_text("direct_url.json") or "{}")


def ask(requirements: list[str]) -> dict[str, Any] | str:
    """pip-audit's report on exact versions, or the last line of what it said instead."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.txt")
        path.write_text("\n".join(requirements), encoding="utf-8")
        words = ["--requirement", str(path), "--no-deps", "--disable-pip", "--format", "json"]
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", *words, *sys.argv[1:]],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        return json.loads(done.stdout)
    except ValueError:
        return next(reversed(done.stderr.strip().splitlines()), f"pip-audit ended with {done.returncode}")


def cannot_look_up(report: dict[str, Any] | str) -> str | None:
    """Why a report on `KNOWN_FAULTY` shows that nothing can be looked up, None where its faults
    were found."""
    if isinstance(report, str):
        return report
    if any(package.get("vulns") for package in report["dependencies"]):
        return None
    return f"of {KNOWN_FAULTY}, which has many, none was found"


def verdict(report: dict[str, Any] | str) -> tuple[list[str], bool]:
    """What to say of a report on the installed packages, and whether a fault has a fix."""
    if isinstance(report, str):
        return [f"the lookup stopped half-way ({report})"], True
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    said = [f"{len(packages) - len(unknown)} of {len(packages)} packages looked up"]
    said += [f"not known to the index: {', '.join(unknown)}"] * bool(unknown)
    failed = False
    for package in packages:
        for fault in package.get("vulns", []):
            fixed = fault["fix_versions"]
            failed = failed or bool(fixed)
            way = f"fixed in {', '.join(fixed)}: upgrade" if fixed else "not fixed yet"
            said.append(f"{package['name']} {package['version']} has {fault['id']}, {way}")
    return said, failed


if __name__ == "__main__":
    sys.exit(main())
