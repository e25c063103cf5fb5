"""What is built and installed: contents of wheel and sdist, editable modes, clean environments."""

import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from clean import IMPORT, ROOT, Env, build, checkout, quick_compiler

import gatepack

pytest.importorskip("triton")
SOURCES = {"python/gatepack": "gatepack", "triton_kernels": "gatepack/kernels"}
COMPILED = {"GATEPACK_SKIP_EXT": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}
# A checkout is built with a compiler by make, and without torch for `wheel`.
ORIGINS = ["sdist", pytest.param("checkout", marks=pytest.mark.slow)]
CSRC = sorted(path.name for path in (ROOT / "csrc").iterdir() if path.is_file())


def expected_files() -> set[str]:
    """Every source file under the name that the wheel gives it."""
    files = {f"gatepack/csrc/{name}" for name in CSRC} | {"gatepack/py.typed"}
    for folder, package in SOURCES.items():
        files |= {f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py")}
        for inner in (ROOT / folder).glob("*/__init__.py"):
            if not inner.parent.is_symlink():
                name = f"{package}/{inner.parent.name}"
                files |= {f"{name}/{path.name}" for path in inner.parent.glob("*.py")}
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("a path with spaces")


@pytest.fixture(scope="module")
def bare(folder) -> Env:
    """setuptools and nothing else: no torch."""
    env = Env(folder / "bare", borrow=False)
    absent = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('numpy'))"
    assert env.python(absent).split() == ["None", "None"]
    return env


@pytest.fixture(scope="module")
def tree(folder) -> Path:
    return checkout(folder / "my checkout")


@pytest.fixture(scope="module")
def wheel(folder, tree, bare) -> Path:
    return build("wheel", tree, folder / "wheels", bare)


@pytest.fixture(scope="module")
def sdist(folder, tree, bare) -> Path:
    return build("sdist", tree, folder / "sdists", bare)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    return quick_compiler(tmp_path_factory.mktemp("compiler"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def payload(wheel: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}


class TestWithoutTorch:
    """Built where torch is absent."""

    def test_wheel_holds_every_source_and_nothing_else(self, wheel):
        assert wheel.name == f"gatepack-{gatepack.__version__}-py3-none-any.whl"
        assert set(payload(wheel)) == expected_files()
        assert all(payload(wheel)[f"gatepack/csrc/{name}"] for name in CSRC)

    def test_files_of_an_earlier_build_stay_out(self, folder, bare):
        source = checkout(folder / "stale")
        stale = source / "build" / "lib" / "gatepack" / "removed_since.py"
        stale.parent.mkdir(parents=True)
        stale.write_text("")
        assert "gatepack/removed_since.py" not in payload(
            build("wheel", source, folder / "stale wheels", bare)
        )

    def test_metadata_is_complete(self, wheel):
        files = contents(wheel)
        (name,) = [name for name in files if name.endswith(".dist-info/METADATA")]
        metadata = files[name].decode()
        assert f"\nVersion: {gatepack.__version__}\n" in metadata
        assert "\nLicense-Expression: Apache-2.0\n" in metadata
        assert "\nRequires-Python: >=3.10\n" in metadata
        assert {"torch", "triton", "transformers", "typer", "rich"} <= set(
            re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)
        )

    def test_sdist_holds_real_files_and_gives_the_same_wheel(self, folder, sdist, wheel, bare):
        with tarfile.open(sdist) as archive:
            members = archive.getmembers()
            assert not [m.name for m in members if not (m.isfile() or m.isdir())]
            archive.extractall(folder / "unpacked", filter="data")
        (root,) = (folder / "unpacked").iterdir()
        names = {m.name.split("/", 1)[1] for m in members if m.isfile()}
        for needed in ("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "setup.py"):
            assert needed in names
        for package in ("csrc/ops.cpp", "triton_kernels/__init__.py", "tests/test_packaging.py"):
            assert package in names
        assert not [n for n in names if re.search(r"__pycache__|\.pyc$|\.so$|^\.|^build/", n)]
        again = build("wheel", root, folder / "from sdist", bare)
        assert payload(again) == payload(wheel)


def test_version_stands_in_one_place():
    version = re.escape(gatepack.__version__)
    named = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.toml", "*.py", "python/**/*.py", "csrc/*", "triton_kernels/*.py")
        for path in sorted(ROOT.glob(pattern))
        if path.is_file() and re.search(rf"(?i)version.*[\"']{version}[\"']", path.read_text())
    ]
    assert named == ["python/gatepack/__init__.py"]


def test_wheel_works_in_a_clean_environment(folder, wheel):
    env = Env(folder / "clean")
    env.install("--no-index", str(wheel))
    found = env.look()
    assert Path(found["package"]) == env.site / "gatepack"
    assert Path(found["kernels"]) == env.site / "gatepack" / "kernels"
    assert found["version"] == found["metadata"] == gatepack.__version__
    assert found["typed"] and found["csrc"] == CSRC
    assert env.look(IMPORT) == {"kernels": found["kernels"], "mark": None, "csrc": CSRC}
    assert env.run("gatepack", "--version").stdout.strip() == gatepack.__version__
    assert env.run("python", "-m", "gatepack", "--version").stdout.strip() == gatepack.__version__
    missing = env.python(
        "import importlib.util; print(importlib.util.find_spec('triton_kernels'))", cwd=folder
    )
    assert missing.strip() == "None", "the kernels must not answer to OpenAI's name"


def test_kernel_sources_are_refused_under_the_name_of_another_package(tree, bare):
    done = bare.run(str(bare.bin / "python"), "-c", "import triton_kernels", cwd=tree, check=False)
    assert done.returncode != 0
    assert "import gatepack.kernels instead" in done.stdout


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(mode, folder):
    source = checkout(folder / f"editable {mode}", mark=mode)
    env = Env(folder / f"env {mode}")
    env.install("--config-settings", f"editable_mode={mode}", "-e", str(source))
    found = env.look()
    assert Path(found["package"]) != env.site / "gatepack"
    assert found["mark"] == [mode]
    assert found["version"] == found["metadata"] == gatepack.__version__
    assert found["typed"] and found["csrc"] == CSRC
    assert env.look(IMPORT) == {"kernels": found["kernels"], "mark": mode, "csrc": CSRC}
    # Edits of files are seen without another install.
    with open(source / "triton_kernels" / "__init__.py", "a") as handle:
        handle.write("\nMARK = 'edited'\n")
    assert env.look()["mark"] == [mode, "edited"]


def test_two_checkouts_are_never_mixed(folder, bare):
    sources, envs = [], []
    for name, version in (("first", "1.0.1"), ("second", "2.0.2")):
        sources.append(checkout(folder / f"{name} checkout", version=version, mark=name))
        envs.append(Env(folder / f"{name} env"))
        envs[-1].install("-e", str(sources[-1]))
    # From the other one's folder, which is where an unlucky sys.path would find the wrong one.
    for env, elsewhere, mark, version in (
        (envs[0], sources[1], "first", "1.0.1"),
        (envs[1], sources[0], "second", "2.0.2"),
    ):
        found = env.look(cwd=elsewhere)
        assert (found["mark"], found["version"], found["metadata"]) == ([mark], version, version)
    # A wheel of the second takes the place of the first's editable install.
    wheel = build("wheel", sources[1], folder / "second wheels", bare)
    envs[0].install("--no-index", str(wheel))
    found = envs[0].look(cwd=sources[0])
    assert (found["mark"], found["metadata"]) == (["second"], "2.0.2")
    assert Path(found["package"]) == envs[0].site / "gatepack"


def test_without_a_compiler(folder):
    env = Env(folder / "uncompiled")
    source = checkout(folder / "uncompiled source")
    done = env.install(
        "-v", str(source), GATEPACK_SKIP_EXT="0", CXX="/nonexistent/c++", CC="/nonexistent/cc"
    )
    assert re.search(r"gatepack.*without gatepack\._C", done.stdout)
    record = next(env.site.glob("gatepack-*.dist-info/WHEEL")).read_text()
    assert "py3-none-any" in record
    cache = str(folder / "uncompiled cache")
    text = env.python(FOLD_PACK, CXX="/nonexistent/c++", GATEPACK_CACHE_DIR=cache)
    assert text.splitlines()[-1].startswith("torch")
    assert text.count("fold_pack on cpu is plain torch") == 1


class TestInstall:
    """pip install as users type it."""

    @pytest.fixture
    def scratch(self, folder, request) -> dict[str, str]:
        """pip unpacks an sdist in TMPDIR: a path with spaces, too."""
        path = folder / f"unpacked for {request.node.name}"
        path.mkdir()
        return {"TMPDIR": str(path)}

    @pytest.mark.parametrize("origin", ORIGINS)
    def test_with_build_isolation(self, origin, folder, sdist, scratch):
        env = Env(folder / f"isolated {origin}")
        source = sdist if origin == "sdist" else checkout(folder / "isolated source")
        done = env.pip("install", "--no-deps", str(source), **scratch, check=False)
        if "No matching distribution found for setuptools" in done.stdout:
            pytest.skip("no package index to fetch setuptools from")
        assert done.returncode == 0, done.stdout
        found = env.look()
        assert Path(found["package"]) == env.site / "gatepack"
        assert found["version"] == found["metadata"] == gatepack.__version__
        record = next(env.site.glob("gatepack-*.dist-info/WHEEL")).read_text()
        assert "py3-none-any" in record, "the isolated build has no torch, so nothing is compiled"
        absent = {"CXX": "/nonexistent/c++", "GATEPACK_CACHE_DIR": str(folder / "isolated cache")}
        assert env.python(FOLD_PACK, **absent).splitlines()[-1].startswith("torch")
        extension = diagnosed(env, **absent)
        assert (extension["state"], extension["found"]) == ("gap", "plain torch")
        assert "/nonexistent/c++ does not work" in extension["why"]

    @pytest.mark.parametrize("origin", ORIGINS)
    def test_with_a_compiler(self, origin, folder, sdist, wheel, compiler, scratch):
        env = Env(folder / f"compiled {origin}")
        source = sdist if origin == "sdist" else checkout(folder / "compiled source")
        env.install(str(source), **COMPILED, **scratch, CXX=compiler)
        (module,) = (env.site / "gatepack").glob("_C*.so")
        record = next(env.site.glob("gatepack-*.dist-info/WHEEL")).read_text()
        assert re.search(r"Tag: cp310-abi3-linux_\w+", record)
        files = {
            path.relative_to(env.site).as_posix()
            for path in (env.site / "gatepack").rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".so")
        }
        assert files == set(payload(wheel))
        backend = env.python(FOLD_PACK).splitlines()[-1]
        assert backend.startswith(("cpp", "cuda")) and "installed with the package" in backend
        assert str(module) in diagnosed(env)["found"]

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
    def test_editable_with_a_compiler(self, mode, folder, compiler):
        env = Env(folder / f"compiled {mode}")
        source = checkout(folder / f"compiled {mode} source")
        settings = ("--config-settings", f"editable_mode={mode}", "-e", str(source))
        env.install(*settings, **COMPILED, CXX=compiler)
        backend = env.python(FOLD_PACK).splitlines()[-1]
        assert backend.startswith(("cpp", "cuda")) and "installed with the package" in backend


def diagnosed(env: Env, **variables: str) -> dict:
    """What `gatepack doctor --json` says of the extension; called from the environment's folder."""
    done = env.run("gatepack", "doctor", "--json", **variables)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["gatepack"] == gatepack.__version__
    found = {f"{s['name']}/{f['name']}": f for s in report["sections"] for f in s["findings"]}
    assert found["ops/column_dot"]["found"] in ("triton, compiled", "reference")
    return found["extension/gatepack._C"]


# The same result on every backend.
FOLD_PACK = """
import torch
from gatepack import _ext
w = torch.arange(12.0).view(3, 4)
for _ in range(2):
    out = _ext.fold_pack(w, torch.tensor([0, 2]), None, torch.tensor([1.0, 0.5]))
assert torch.equal(out, torch.tensor([[0.0, 1, 2, 3], [4, 4.5, 5, 5.5]])), out
print(*_ext.backend())
"""
