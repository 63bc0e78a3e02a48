"""Fail unless what lies in dist/ is what laps-rs promises: abi3, manylinux_2_28, no torch, CUDA or OpenMP.

laps-rs-native links the libtorch that it was built for, and runs on systems like the one that built it: it is
held to abi3, its files, and no libraries but libtorch's.

    python scripts/check_wheel.py [WHEEL OR SDIST ...]      # default: all of dist/

The tags are checked as the wheel states them, and what they stand for is read from the binary itself: the
libraries that it needs (NEEDED in its dynamic section), and the newest glibc that its symbols ask for.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

# glibc's own libraries and the compiler's unwinder. libdl, librt and libpthread are empty shells since glibc
# 2.34.
ALLOWED = re.compile(r"(libc|libm|libdl|librt|libpthread|libgcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")
TORCH = re.compile(r"lib(torch|torch_cpu|torch_cuda|torch_python|c10)\.so|lib(stdc\+\+|gomp)\.so\.\d+")
NEWEST_GLIBC = (2, 28)
# PEP 600's names for the older policies.
OLD_POLICIES = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
NATIVE_FILES = ("laps_native/__init__.py", "laps_native/_native.pyi", "laps_native/py.typed")
SDIST_FILES = (
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "PKG-INFO",
    "README.md",
    "pyproject.toml",
    "python/laps/__init__.py",
    "src/lib.rs",
    "tests/reference.py",
)


# Hidden, compiled, cached: what a build or an editor leaves in the working tree.
STRAY = re.compile(r"(^|/)(\.|__pycache__/|target/|dist/|out/)|\.(so|pyc|whl|partial)$")


def package_files() -> list[str]:
    """What the packages of the source tree hold, beside what a build leaves there."""
    root = Path(__file__).resolve().parent.parent / "python"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return [name for name in names if not STRAY.search(name)]


@dataclass(frozen=True)
class Binary:
    """What one shared library asks of the system that loads it."""

    name: str
    needed: tuple[str, ...]
    glibc: tuple[int, ...]


def read_binary(name: str, content: bytes) -> Binary:
    """NEEDED and the newest GLIBC_x.y among the versions that the library's symbols require."""
    needed: list[str] = []
    versions: list[tuple[int, ...]] = [(0,)]
    for section in ELFFile(io.BytesIO(content)).iter_sections():
        if isinstance(section, DynamicSection):
            # pyelftools gives a tag the attribute when it reads DT_NEEDED.
            needed += [tag.needed for tag in section.iter_tags("DT_NEEDED")]  # type: ignore[attr-defined]
        elif isinstance(section, GNUVerNeedSection):
            names = [auxiliary.name for _, required in section.iter_versions() for auxiliary in required]
            found = [re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", version) for version in names]
            versions += [tuple(map(int, match[1].split("."))) for match in found if match]
    return Binary(name, tuple(needed), max(versions))


def tag_problems(wheel: str, portable: bool = True) -> list[str]:
    """What is wrong with a wheel's file name; one that need not be portable may have any platform."""
    *_, python, abi, platforms = Path(wheel).stem.split("-")
    problems = []
    if abi != "abi3":
        problems.append(f"its ABI tag is {abi} (expected abi3)")
    if python != "cp310":
        problems.append(f"its Python tag is {python} (expected cp310)")
    for platform in platforms.split(".") if portable else ():
        match = re.match(r"manylinux_(\d+)_(\d+)_", platform)
        policy = (int(match[1]), int(match[2])) if match else OLD_POLICIES.get(platform.split("_")[0])
        if policy is None or policy > NEWEST_GLIBC:
            problems.append(f"its platform tag is {platform} (expected manylinux_2_28 or older)")
    return problems


def binary_problems(binary: Binary, portable: bool = True) -> list[str]:
    """What is wrong with one shared library; one that need not be portable may link libtorch."""
    expected = "glibc's libraries and libgcc_s" + ("" if portable else ", and libtorch's")
    problems = [
        f"{binary.name} needs {library} (expected {expected} only)"
        for library in binary.needed
        if not (ALLOWED.fullmatch(library) or (not portable and TORCH.fullmatch(library)))
    ]
    if portable and binary.glibc > NEWEST_GLIBC:
        problems.append(
            f"{binary.name} needs glibc {'.'.join(map(str, binary.glibc))} (expected 2.28 or older)"
        )
    return problems


def sdist_problems(names: list[str]) -> list[str]:
    """What is wrong with the file names in a source distribution."""
    files = [name.partition("/")[2] for name in names]
    problems = [f"{name} is not in it" for name in SDIST_FILES if name not in files]
    strays = [name for name in files if STRAY.search(name)]
    if strays:
        problems.append(f"{len(strays)} files do not belong in it, such as {strays[0]}")
    return problems


def check_sdist(sdist: Path) -> list[str]:
    """Print what the source distribution is; returns what is wrong with it."""
    with tarfile.open(sdist) as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB, {len(names)} files")
    return sdist_problems(names)


def check_wheel(wheel: Path) -> list[str]:
    """Print what the wheel is; returns what is wrong with it."""
    native = wheel.name.startswith("laps_rs_native-")
    library = "laps_native/_native.abi3.so" if native else "laps/_laps.abi3.so"
    problems = tag_problems(wheel.name, portable=not native)
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        binaries = [read_binary(name, archive.read(name)) for name in names if ".so" in Path(name).suffixes]
    problems += [
        f"{name} is not in it" for name in (NATIVE_FILES if native else package_files()) if name not in names
    ]
    problems += [
        f"{licence} is not in it"
        for licence in ("LICENSE-MIT", "LICENSE-APACHE")
        if not any(name.endswith("/" + licence) for name in names)
    ]
    if [binary.name for binary in binaries] != [library]:
        problems.append(f"its libraries are {[binary.name for binary in binaries]} (expected {library})")
    for binary in binaries:
        glibc = ".".join(map(str, binary.glibc))
        print(f"  {binary.name}: needs {', '.join(binary.needed) or 'nothing'}; glibc {glibc}")
        problems += binary_problems(binary, portable=not native)
    return problems


def main(arguments: list[str]) -> int:
    """Check wheels and source distributions; returns the exit status."""
    dist = Path(__file__).resolve().parent.parent / "dist"
    paths = [Path(argument) for argument in arguments] or sorted(
        [*dist.glob("*.tar.gz"), *dist.glob("*.whl")]
    )
    if not arguments and not any(path.suffix == ".whl" for path in paths):
        print(f"check_wheel: no wheel in {dist} (run: make wheel)", file=sys.stderr)
        return 1
    problems = []
    for path in paths:
        check = check_wheel if path.suffix == ".whl" else check_sdist
        problems += [f"{path.name}: {problem}" for problem in check(path)]
    for problem in problems:
        print(f"check_wheel: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
