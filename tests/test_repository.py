"""What the project promises about itself: shared blocks, the diff, the README."""

import ast
import dataclasses
import difflib
import re
import shlex

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()


def shared_blocks(path):
    text = path.read_text()
    blocks = re.findall(r"^# --- shared: (\w+) ---\n(.*?)^# --- end shared ---$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("# --- shared: ") == text.count("# --- end shared ---"), path
    return dict(blocks)


def test_shared_blocks_are_equal_to_the_byte():
    seen, compared = {}, 0
    for path in SCRIPTS:
        for name, block in shared_blocks(path).items():
            first, text = seen.setdefault(name, (path, block))
            assert block == text, f"block {name!r} differs between {first.name} and {path.name}"
            compared += first != path
    assert compared >= 5


def test_the_diff_is_the_method():
    dense, rnm = ((ROOT / name).read_text() for name in ("dense_td3_continuous.py", "rnm_td3_continuous.py"))
    rnm = re.sub(r"^# --- kernels ---\n.*?^# --- end kernels ---\n\n\n", "", rnm, flags=re.DOTALL | re.MULTILINE)
    changed = [
        line
        for line in difflib.unified_diff(dense.splitlines(), rnm.splitlines(), n=0)
        if line[0] in "+-" and line[1:].strip() and line[:3] not in ("+++", "---") and line[1:7] != "# --- "
    ]
    assert 50 < len(changed) <= 150
    assert not any("n_of_m" in line or "NMLinear" in line for line in dense.splitlines())


def test_no_imports_between_scripts():
    for path in SCRIPTS:
        for other in SCRIPTS:
            assert not re.search(rf"^\s*(import|from) {other.stem}\b", path.read_text(), re.MULTILINE)


def test_every_argument_is_read_and_explained(script):
    text = (ROOT / script.__file__).read_text()
    for field in dataclasses.fields(script.Args):
        assert re.search(rf"args\.{field.name}\b", text) or field.name == "resume", field.name
        assert re.search(rf'^    {field.name}: .*\n    """.+"""$', text, re.MULTILINE), field.name


def test_defaults_of_the_twins_agree(dense, rnm):
    common = {f.name: f.default for f in dataclasses.fields(dense.Args) if f.name != "exp_name"}
    assert common.items() <= {f.name: f.default for f in dataclasses.fields(rnm.Args)}.items()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [c for block in blocks for line in block.splitlines() for c in re.split(r"&&|;| & ", line.split("#")[0])]
    found = []
    for command in commands:
        match = re.search(r"python ((?:rnm|dense)_td3_continuous\.py.*?)(?: &|$)", command.replace("done", "").strip())
        if match and "<run_name>" not in command and "--help" not in command:
            found.append(shlex.split(match[1].replace("{}", "1")))
    return found


def test_readme_commands_parse(dense, rnm):
    commands = readme_commands()
    assert len(commands) >= 3 and {c[0] for c in commands} == {"dense_td3_continuous.py", "rnm_td3_continuous.py"}
    for name, *argv in commands:
        args = {"dense": dense, "rnm": rnm}[name.split("_")[0]].parse_args(argv)
        assert args.env_id.endswith(("-v4", "-v5"))


def test_readme_names_every_logged_key(dense, rnm):
    for key in [*dense.METRICS, *rnm.METRICS]:
        assert f"`{key.rsplit('/', 1)[0]}/" in README or f"`{key}`" in README, key
        assert key.rsplit("/", 1)[-1] in README, key


def test_readme_snippet_acts(rnm, small):
    run = rnm.train(small(rnm, env_id="Pendulum-v1", total_timesteps=201, n=1, m=4, hidden_dim=16))["run_dir"]
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("runs/<run_name>", run).replace("Ant-v4", "Pendulum-v1")
    scope = {}
    exec(code, scope)
    assert scope["action"].shape == (1,) and abs(scope["action"]) <= 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_functions_fit_a_screen(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert functions
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60 and f.name != "train"]
