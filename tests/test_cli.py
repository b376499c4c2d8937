"""The command line: each command, each exit code, --json, and everything that can be wrong with what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_files import BAD_MODELS, MODEL, PLUGIN, Result, conv_graph
from safetensors.numpy import save_file

import paring.cli
import paring.cli.check
import paring.doctor
from paring.cli import COMMANDS
from paring.cli.frame import as_plain_data, plain
from paring.doctor import Check, Finding
from paring.ir import constants, show
from paring.passes.pipelines import LOSSY, PASSES, parse_pipeline


@pytest.fixture
def dumped(tmp_path: Path) -> Path:
    """A graph as a dump writes it."""
    graph = conv_graph(np.random.default_rng(0))
    save_file(constants(graph), str(tmp_path / "constants.safetensors"))
    path = tmp_path / "000_import.ir"
    path.write_text(f"# import\n{show(graph)}")
    return path


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.py"
    path.write_text(BAD_MODELS)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return path


# What there is, without torch or TVM.


@pytest.mark.fast
def test_start_imports_nothing_heavy() -> None:
    code = "import sys, paring.cli; print(sorted({'torch', 'tvm', 'numpy', 'networkx', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.fast
def test_version_and_help() -> None:
    assert Result("--version").out == f"paring {paring.__version__}\n"
    shown = Result("--help")
    assert shown.code == 0
    assert all(name in shown.out for name in COMMANDS)


@pytest.mark.fast
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    shown = Result(command, "--help")
    assert shown.code == 0
    assert "--json" in shown.out
    assert "--debug" in shown.out


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["compile"], ["compile", "a.py:f", "--nonsense"], ["run", "x.ir", "--repeat", "-1"]]
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert Result(*arguments).code == 2


@pytest.mark.fast
def test_passes() -> None:
    found = Result("passes", "--json").json()
    assert [entry["name"] for entry in found["passes"]] == [*PASSES, *LOSSY]
    for steps in found["pipelines"].values():
        assert ", ".join(map(str, parse_pipeline(steps))) == steps
    assert "canonicalize" in Result("passes").out
    assert found["here"]["native"] in found["pipelines"]
    assert f"native ({found['here']['native']} here)" in Result("passes").out


@pytest.mark.fast
def test_a_name_that_holds_what_was_given_is_suggested() -> None:
    assert "did you mean 'scaled_dot_product_attention'?" in Result("ops", "attention", "--target", "reference").err


@pytest.mark.fast
def test_a_path_that_is_not_there_is_found_out_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from paring.cli import make_app; from typer.testing import CliRunner;"
        "found = CliRunner().invoke(make_app(), ['run', sys.argv[1]]);"
        "print(found.exit_code, 'no saved network' in found.output, sorted({'torch', 'tvm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "no.paring")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1", "True", "[]"]


@pytest.mark.fast
def test_one_pass(plugin: Path) -> None:
    found = Result("passes", "fold-bn", "--json").json()
    assert "fold-batch-norm" in [rule["name"] for rule in found["rules"]]
    assert all("->" in rule["formula"] for rule in found["rules"])
    found = Result("passes", "wrong", "--plugin", f"{plugin}:Wrong", "--json").json()
    assert found["options"] == [{"name": "factor", "type": "float", "default": 1.0}]
    wrong = Result("passes", "fold-b")
    assert wrong.code == 1
    assert "did you mean 'fold-bn'?" in wrong.err


@pytest.mark.fast
def test_compile_and_run_a_dump_on_the_reference(dumped: Path, tmp_path: Path) -> None:
    done = Result(
        "compile", dumped, "--target", "reference", "--pipeline", "cse, fuse", "--dump", tmp_path / "d", "--check", "--json"
    )
    assert done.code == 0, done.err
    found = done.json()
    assert found["target"] == "reference"
    assert found["check"]["ok"] is True
    assert len(found["ledger"]["entries"]) == 2
    assert (tmp_path / "d" / "000_import.ir").is_file()
    done = Result("run", dumped, "--target", "reference", "--output", tmp_path / "out", "--repeat", 2, "--json")
    found = done.json()
    assert found["times"]["calls"] == 2
    assert np.load(found["written"][0]).shape == (1, 4, 6, 6)
    again = Result("run", dumped, "--target", "reference", "--seed", 1, "--json").json()
    assert again["outputs"][0]["mean"] != found["outputs"][0]["mean"]


@pytest.mark.fast
def test_inputs_from_files(dumped: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 6, 6), np.float32))
    done = Result("run", dumped, "--target", "reference", "--input", tmp_path / "x.npy", "--json")
    assert done.json()["outputs"][0]["max"] == 0.0
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 6, 7), np.float32))
    assert Result("run", dumped, "--target", "reference", "--input", tmp_path / "x.npy").code == 1
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    for name in ("o.npy", "absent.npy", "000_import.ir"):
        done = Result("run", dumped, "--target", "reference", "--input", tmp_path / name)
        assert done.code == 1
        assert "cannot read" in done.err


@pytest.mark.fast
def test_bisect_names_the_planted_rewrite(dumped: Path, plugin: Path) -> None:
    assert (
        Result("bisect", dumped, "--target", "reference", "--pipeline", "canonicalize, cse, fuse", "--json").json()["culprit"]
        is None
    )
    named = ["--pipeline", "canonicalize, wrong, fuse"]
    for options, step in ((named, 2), ([], 1)):
        done = Result("bisect", dumped, "--target", "reference", *options, "--plugin", f"{plugin}:Wrong", "--json")
        assert done.code == 3
        culprit = done.json()["culprit"]
        assert (culprit["kind"], culprit["step"], culprit["pass"], culprit["rule"]) == ("pass", step, "wrong", "relu-to-abs")
        assert culprit["rewrite_number"] == 1
    shown = Result("bisect", dumped, "--target", "reference", "--plugin", f"{plugin}:Wrong")
    assert shown.code == 3
    assert "culprit" in shown.out


@pytest.mark.fast
def test_bisect_sees_a_wrong_rewrite_at_any_depth(plugin: Path) -> None:
    """The magnitude bound grows with depth until it hides everything; the measured noise does not."""
    from paring.cli.inputs import load_plugins
    from paring.passes.bisect import bisect

    rng = np.random.default_rng(0)
    graph, arrays = conv_graph(rng, 40), [rng.standard_normal((1, 4, 6, 6), dtype=np.float32)]
    passes = parse_pipeline("canonicalize, wrong, fuse", load_plugins([f"{plugin}:Wrong"]))
    found = bisect(graph, passes, arrays)
    assert found is not None
    assert (found.step, found.name, found.rewrite_number) == (2, "wrong", 1)
    assert bisect(graph, parse_pipeline("canonicalize, const-fold, cse, dce, fuse"), arrays) is None


@pytest.mark.fast
def test_why_not(dumped: Path, plugin: Path) -> None:
    found = Result("why-not", dumped, "--target", "x86-avx2", "--pass", "fuse", "--json").json()
    assert all(entry["pass"] == "fuse" and entry["why"] for entry in found)
    assert Result("why-not", dumped, "--pass", "fuze").code == 1
    assert Result("why-not", dumped, "--plugin", f"{plugin}:Wrong").code == 0


# What can be wrong.


@pytest.mark.fast
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("absent.py:make", "no file"),
        ("absent_module:make", "no module"),
        ("{bad}", "which function"),
        ("{bad}:lonly", "did you mean 'lonely'?"),
        ("{bad}:number", "not a function"),
        ("{bad}:needs", "without arguments"),
        ("{bad}:lonely", "not (model, example_inputs)"),
        ("{bad}:triple", "a tuple of 3 that ends with an int"),
        ("{bad}:quadruple", "a tuple of 4"),
        ("{bad}:odd_inputs", "example inputs"),
        ("{bad}:raises", "raised ValueError"),
        ("{bad}:stops", "raised SystemExit"),
        ("net.pt", "runs whatever code is in it"),
        ("net.pt2", "runs whatever code is in it"),
        ("net.onnx", "no ONNX importer"),
        ("absent.ir", "cannot read"),
    ],
)
def test_bad_models(spec: str, said: str, bad: Path) -> None:
    done = Result("compile", spec.format(bad=bad), "--target", "reference", "--json")
    assert done.code == 1
    assert said in done.err
    assert done.json()["exit_code"] == 1


@pytest.mark.fast
def test_error_of_a_model_names_its_line_and_is_not_markup(bad: Path) -> None:
    done = Result("compile", f"{bad}:raises")
    assert "[bold]luck[/bold]" in done.err
    assert "\x1b" not in done.err
    line = next(i for i, text in enumerate(BAD_MODELS.splitlines(), 1) if "raise ValueError" in text)
    assert f"{bad}:{line}" in done.err
    assert "Traceback" not in done.err
    assert "Traceback" in Result("compile", f"{bad}:raises", "--debug").err


@pytest.mark.fast
def test_a_file_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "syntax.py").write_text("def make(:\n")
    done = Result("compile", f"{tmp_path / 'syntax.py'}:make")
    assert done.code == 1
    assert "syntax.py:1" in done.err


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "x87"], "did you mean 'x86'?"),
        (["--passes", "fold-bm"], "did you mean 'fold-bn'?"),
        (["--passes", "layout{blok=8}"], "did you mean 'block'?"),
        (["--pipeline", "layout{block"], "layout"),
        (["--output", "{dir}/000_import.ir/x.paring"], "cannot write"),
        (["--dump", "{dir}/000_import.ir/x"], "cannot write"),
        (["--plugin", "{dir}/plugin.py:NotAPass"], "not a pass"),
        (["--plugin", "{dir}/plugin.py:Absent"], "has no 'Absent'"),
        (["--plugin", "{dir}/plugin.py:Failing"], "plugin.py:"),
        (["--plugin", "{dir}/plugin.py:Failing"], "rule fails at relu"),
        (["--target", "arm", "--check"], "--device emulator"),
    ],
)
def test_bad_arguments(options: list[str], said: str, dumped: Path, plugin: Path) -> None:
    target = [] if "--target" in options else ["--target", "reference"]
    done = Result("compile", dumped, *target, *[option.replace("{dir}", str(dumped.parent)) for option in options])
    assert done.code == 1, done.err
    assert said in done.err


@pytest.mark.fast
def test_damaged_dumps(dumped: Path) -> None:
    (dumped.parent / "constants.safetensors").write_bytes(b"nothing of the kind")
    assert Result("compile", dumped, "--target", "reference").code == 1
    (dumped.parent / "constants.safetensors").unlink()
    done = Result("compile", dumped, "--target", "reference")
    assert done.code == 1
    assert "constants.safetensors" in done.err
    dumped.write_text("graph(%0 {")
    done = Result("compile", dumped, "--target", "reference")
    assert done.code == 1
    assert "line 1" in done.err


@pytest.mark.fast
def test_a_mistake_of_ours_is_4(dumped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a table was empty")

    monkeypatch.setattr("paring.cli.inputs.load_model", broken)
    done = Result("compile", dumped, "--target", "reference", "--json")
    assert done.code == 4
    assert done.json()["error"]["what"] == "RuntimeError: a table was empty"
    assert "report" in done.err
    assert "Traceback" not in done.err
    assert "Traceback" in Result("compile", dumped, "--target", "reference", "--debug").err


@pytest.mark.fast
def test_a_mismatch_is_3(dumped: Path, plugin: Path) -> None:
    done = Result("compile", dumped, "--target", "reference", "--plugin", f"{plugin}:Wrong", "--check", "--json")
    assert done.code == 3
    assert done.json()["check"]["ok"] is False


@pytest.mark.fast
def test_interrupted_is_130(bad: Path) -> None:
    command = [sys.executable, "-m", "paring.cli", "compile", f"{bad}:interrupted", "--target", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.fast
def test_a_closed_pipe_is_no_error() -> None:
    command = f"'{sys.executable}' -m paring.cli passes --json | head -c 10"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.fast
def test_plain_data() -> None:
    assert as_plain_data({"a": (1, float("inf"), Path("/x")), 2: np.float32(0.5)}) == {"a": [1, "inf", "/x"], "2": "0.5"}
    assert plain("a\x1b[31mb\r\n") == "a\\x1b[31mb\\r\n"


@pytest.mark.fast
def test_doctor_fails_only_for_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> Finding:
        raise RuntimeError("in the check")

    good, lacking = (
        Check("one", lambda: Finding(True, "here"), True),
        Check("two", lambda: Finding(False, "gone", "get it"), False),
    )
    monkeypatch.setattr(paring.doctor, "CHECKS", (good, lacking))
    done = Result("doctor", "--json")
    assert (done.code, done.json()["ok"]) == (0, True)
    assert "get it" in Result("doctor").out
    monkeypatch.setattr(paring.doctor, "CHECKS", (good, Check("three", crash, True)))
    done = Result("doctor", "--json")
    assert (done.code, done.json()["ok"]) == (1, False)


@pytest.mark.fast
def test_a_crash_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paring.doctor, "_TVM_WORKS", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    finding = paring.doctor._tvm_works()
    assert not finding.ok
    assert "signal 11" in finding.detail
    assert "apache-tvm-ffi" in finding.hint


@pytest.mark.fast
def test_a_failed_check_says_all_that_the_error_says(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "TargetError('no such machine', where='target x', why='it has\\nno cores', hint='buy one')"
    monkeypatch.setattr(paring.doctor, "_PARING_WORKS", f"from paring.errors import TargetError\nraise {error}")
    finding = paring.doctor._compiles()
    said = "TargetError: no such machine\n  where: target x\n  why: it has\nno cores\n  hint: buy one"
    assert (finding.ok, finding.detail) == (False, said)
    monkeypatch.setattr(paring.doctor, "CHECKS", (Check("compile and run", paring.doctor._compiles, True),))
    done = Result("doctor")
    assert done.code == 1
    assert all(line.strip() in done.out for line in said.splitlines())
    monkeypatch.setattr(paring.doctor, "_PARING_WORKS", "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(5)")
    assert paring.doctor._compiles().detail == "first\nsecond"
    monkeypatch.setattr(paring.doctor, "_PARING_WORKS", "raise SystemExit(5)")
    assert paring.doctor._compiles().detail == "exit status 5"


# With torch and TVM.


def test_from_a_model_to_a_saved_network_and_back(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "net.paring"
    done = Result("compile", f"{model}:make", "--target", "native", "--output", saved, "--check", "--json")
    assert done.code == 0, done.err
    check = done.json()["check"]
    assert check["ok"]
    assert check["limit"] == 3.0
    shown = Result("inspect", saved, "--json").json()
    assert shown["manifest"]["inputs"][0]["shape"] == [1, 3, 8, 8]
    assert "graph(" in Result("inspect", saved, "--ir").out
    shown = Result("inspect", saved).out
    assert "sha256" in shown
    assert "fired" in shown
    assert " ms " not in shown
    refused = Result("run", saved, "--target", "arm")
    assert (refused.code, "--target arm is of no use" in refused.err) == (1, True)
    done = Result("run", saved, "--seed", 3, "--repeat", 3, "--output", tmp_path / "out", "--json")
    assert [entry["name"] for entry in done.json()["outputs"]] == ["logits", "features"]
    assert np.load(tmp_path / "out" / "000_logits.npy").shape == (1, 5)
    again = Result("run", saved, "--seed", 3, "--rebuild", "--json")
    assert again.json()["outputs"] == done.json()["outputs"]
    library = (saved / "lib.so").read_bytes()
    (saved / "lib.so").write_bytes(b"damaged")
    for command in ("inspect", "run"):
        damaged = Result(command, saved)
        assert (damaged.code, "hint: paring run --rebuild" in damaged.err) == (1, True)
    (saved / "lib.so").write_bytes(library)
    program = saved / "graph.ir"
    program.write_text(program.read_text().replace("float32", "float33"))
    for command in ("inspect", "run"):
        assert Result(command, saved).code == 1


def test_inputs_by_name(model: Path) -> None:
    done = Result("compile", f"{model}:by_name", "--check", "--json")
    assert done.code == 0, done.err
    assert Result("run", f"{model}:by_name", "--json").code == 0
    assert Result("run", f"{model}:both", "--target", "reference", "--json").code == 0


def test_a_factory_of_a_module(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    done = Result("run", "net:make", "--target", "reference", "--json")
    assert done.code == 0, done.err


def test_stdout_holds_json_alone(model: Path) -> None:
    command = [sys.executable, "-m", "paring.cli", "compile", f"{model}:make", "--target", "reference", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["target"] == "reference"
    assert "noise\n" in done.stderr
    assert "noise from below" in done.stderr


def test_bisect_finds_nothing_in_a_right_compiler(model: Path) -> None:
    done = Result("bisect", f"{model}:make", "--target", "native", "--json")
    assert done.code == 0, done.out + done.err
    assert done.json()["check"]["ok"]


def test_bisect_names_a_wrong_kernel() -> None:
    """One kernel's result is changed on its way out, as a wrong schedule would."""
    from paring.backends import targets
    from paring.backends.build import build
    from paring.backends.devices import open_executable
    from paring.passes.manager import run_pipeline
    from paring.passes.pipelines import pipeline

    rng = np.random.default_rng(0)
    target = targets.resolve("native")
    passes = pipeline(target.pipeline, target.pipeline_options())
    graph, arrays = run_pipeline(conv_graph(rng, 3), passes).graph, [rng.standard_normal((1, 4, 6, 6), dtype=np.float32)]
    with open_executable(build(graph, target), target) as executable:
        assert paring.cli.check.wrong_kernel(executable, arrays, lambda *_: None) is None

        class Planted:
            built = executable.built

            def trace(self, inputs: Any) -> Any:
                for number, (step, result) in enumerate(executable.trace(inputs), 1):
                    if number == 2:
                        result.flat[5] += 0.01
                    yield step, result

            run = executable.run

        found = paring.cli.check.wrong_kernel(Planted(), arrays, lambda *_: None)
        assert found is not None
        assert found.number == 2
        assert found.ulps > found.limit

        class Overwritten(Planted):
            trace = executable.trace

            def run(self, inputs: Any) -> Any:
                return [output + 1 for output in executable.run(inputs)]

        found = paring.cli.check.wrong_kernel(Overwritten(), arrays, lambda *_: None)
        assert found is not None
        assert "memory plan" in found.node


def test_ops() -> None:
    found = {entry["name"]: entry for entry in Result("ops", "--json").json()}
    assert {"conv", "depthwise"} <= set(found["conv2d"]["families"])
    assert found["conv2d"]["operands"] == "2 to 3"
    assert all(entry["families"] for name, entry in found.items() if name not in ("input", "const", "region", "reshape"))
    one = Result("ops", "conv2d", "--json").json()
    assert "float32[" in one["examples"][0]
    assert Result("ops", "conv3d").code == 1


def test_doctor_here() -> None:
    done = Result("doctor", "--json")
    assert done.code == 0, done.out
    assert [check["name"] for check in done.json()["checks"]] == [check.name for check in paring.doctor.CHECKS]
