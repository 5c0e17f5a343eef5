"""Bad input of every kind ends in one sentence and exit status 2, without a traceback."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pictures
import pytest
import ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipedream_hpc.cli import app, main
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import save
from pipedream_hpc.planning.profile import LayerProfile, Profile

JOB = str(ranks.PROGRAMS / "small_job.py")
PIPEDREAM = (sys.executable, "-m", "pipedream_hpc.cli")
LINKS = ("--devices", "2", "--bandwidth", "1e9")


def profile() -> Profile:
    layers = tuple(LayerProfile(f"l{i}", "Linear", 1e-3, 2e-3, 1000, 1000) for i in range(3))
    return Profile("net", "cpu", 8, layers, ((0, 1), (1, 2)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good profile and plans, and files that are wrong in some way."""
    monkeypatch.chdir(tmp_path)
    save(profile(), "profile.json")
    save(pictures.plan(1, 1), "plan.json")
    save(pictures.plan(2, 1), "replicated.json")
    wrong = json.loads(Path("profile.json").read_text())
    wrong["layers"][1]["forward_s"] = -1.0
    Path("negative.json").write_text(json.dumps(wrong))
    wrong["layers"][1]["forward_s"] = 1e308
    Path("endless.json").write_text(json.dumps(wrong))
    Path("broken.json").write_text("{")
    Path("nothing.py").write_text("x = 1\n")
    Path("endless.py").write_text(
        "import torch\nfrom pipedream_hpc import Job\n"
        "def job(args):\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))\n"
        "    return Job(model, torch.nn.MSELoss(), torch.optim.Adam, (x for x in ()), torch.ones(2, 2))\n"
    )
    Path("other.py").write_text("def job(args): return 3\n")
    Path("none.py").write_text("def job(): return 3\n")
    Path("two.py").write_text("def job(args, more): return 3\n")
    Path("published.txt").write_text("node1 -- Linear -- a minute\n")
    Path("occupied").write_text("a file where a folder should be\n")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("partition absent.json", "absent.json: cannot be read: No such file or directory"),
        ("partition broken.json --devices 2 --bandwidth 1e9", "broken.json: is not JSON"),
        ("partition plan.json --devices 2 --bandwidth 1e9", "'format' should be 'pipedream-profile' but is"),
        ("partition negative.json --devices 2 --bandwidth 1e9", "field 'layers[1].forward_s'"),
        ("partition profile.json", "either --topology FILE, or --devices with either --bandwidth or --preset"),
        ("partition profile.json --devices 2", "either --topology FILE, or --devices with either --bandwidth"),
        ("partition profile.json --devices 2y2 --bandwidth 1e9", "such as 8x2, each from 1 to 1048576, not '2y2'"),
        ("partition profile.json --devices 8x --bandwidth 1e9", "each from 1 to 1048576, not '8x'"),
        ("partition profile.json --devices 0 --bandwidth 1e9", "--devices should be a number such as 16"),
        ("partition profile.json --devices 2x2 --bandwidth 1e9", "--bandwidth should be 2 numbers, one per level"),
        ("partition profile.json --devices 2 --bandwidth fast", "--bandwidth should be numbers separated by commas"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --latency=-1", "--latency should be from 0 to"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --latency 1e308", "--latency should be from 0 to"),
        ("partition profile.json --devices 2 --bandwidth 1e-300", "should be at least 0.001 bytes per second"),
        ("partition endless.json --devices 2 --bandwidth 1e9", "'layers[1].forward_s': input should be less than"),
        ("partition profile.json --devices 2 --preset lan", "there is no preset 'lan': choose one of cluster-a"),
        ("partition profile.json --devices 2x2 --preset cluster-a", "should be 1 number, one for each level"),
        ("partition profile.json --devices 2 --preset cluster-a --latency 1", "a preset has its own"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --memory 0", "--memory should be a positive number"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --memory 10", "it needs at least"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --batch 0", "--batch should be 1 or more samples"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --compute-scale 0", "--compute-scale should be"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --recompute yes", "should be never, auto or always"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --optimizer lion", "no optimizer kind 'lion'"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --schedule zb", "no schedule 'zb' to plan for"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --cut-after x", "--cut-after: the profile has no layer"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --together x,y", "--together: the profile has no layer"),
        ("partition profile.json --devices 2 --bandwidth 0", "--bandwidth should be at least 0.001 bytes per second"),
        ("partition profile.json --devices 9 --bandwidth 1e9 --straight", "cannot be cut into 9 stages"),
        ("partition profile.json --devices 2 --bandwidth 1e9 --cost free", "no cost formula 'free'"),
        ("partition profile.json --devices 2 --bandwidth 1e9 -o occupied/p.json", "occupied/p.json: cannot be written"),
        ("profile", "either a TARGET to measure or --import FILE"),
        ("profile absent.py", "absent.py: no such file"),
        ("profile no_such_module", "no module named 'no_such_module'"),
        ("profile nothing.py", "nothing.py has no function job"),
        ("profile other.py", "job(args) returned int"),
        ("profile --import published.txt", "published.txt"),
        ("profile none.py", "none.py: job cannot be called with one list of words, those after -- (too many po"),
        ("train two.py --plan 2", "two.py: job cannot be called with one list of words, those after -- (missing a req"),
        (f"profile {JOB} --minibatches 0", "minibatches is 0: profile at least 1"),
        (f"profile {JOB} -- --height 3", "small_job.py takes --width 12 or nothing"),
        ("probe", "only one rank was started"),
        ("simulate profile.json", "'format' should be 'pipedream-plan'"),
        ("simulate plan.json --slow 1=nan", "rank 1 cannot be nan times as slow"),
        ("simulate plan.json --slow 1", "--slow should be RANK=TIMES, such as 3=1.5"),
        ("profile --import published.txt --precision bf16", "apply to a measurement: omit them with --import"),
        ("trace plan.json", "'format' should be 'pipedream-trace'"),
        (f"train {JOB} --plan absent.json", "absent.json: there is no such file"),
        (f"train {JOB} --plan plan.json", "plan.json was made for another model"),
        (f"train {JOB} --plan 0", "needs at least one stage"),
        (f"train {JOB} --plan 9", "cannot be cut into 9 stages"),
        (f"train {JOB} --plan 2-0", "plan '2-0' is neither a number of stages, nor replicas per stage"),
        (f"train {JOB} --plan 2 --schedule forward-only", "the forward-only schedule trains nothing"),
        (f"train {JOB} --plan 2 --chunks 2", "1f1b has one stage per rank, not 2 chunks: use interleaved"),
        (f"train {JOB} --plan 2 --n-microbatches 4", "1f1b passes whole minibatches and does not cut them into 4"),
        (f"train {JOB} --plan 2 --schedule zb-h1 --compile-backend eager", "compiled stages run backwards whole"),
        (f"train {JOB} --plan 2 --schedule zb", "there is no schedule 'zb': choose from 1f1b"),
        (f"train {JOB} --plan 2 --schedule broken.json", "broken.json"),
        (f"train {JOB} --plan 2 --precision fp8", "precision should be one of 'bf16', 'fp16' or None, not 'fp8'"),
        (f"train {JOB} --plan 2 --clip-grad-norm 0", "clip_grad_norm should be a positive number"),
        (f"train {JOB} --plan 2 --clip-grad-over all", "clip_grad_over should be one of 'stage', 'model', not 'all'"),
        (f"train {JOB} --plan 2 --gradient-accumulation-steps 0", "gradient_accumulation_steps should be an integer"),
        (f"train {JOB} --plan 2 --compile-backend gcc", "compile_backend should be one of"),
        (f"train {JOB} --plan 2 --device tpu", "device should be one of 'auto', 'cpu', 'cuda', not 'tpu'"),
        (f"train {JOB} --plan 2 --stall-limit-s -1", "stall_limit_s should be a positive number of seconds"),
        (f"train {JOB} --plan 2 --out occupied/out", "occupied/out: cannot be written: Not a directory"),
        (f"train {JOB} --plan 2 --resume", "--resume needs to know from where"),
        (
            f"train {JOB} --plan 2 --precision fp16",
            "nor losses be scaled for fp16, where each stage updates by itself: use 1f1b-flush, zb-h1",
        ),
        ("train endless.py --plan 2", "generator has no length"),
        (f"verify {JOB} --plan 2 --tolerance nan", "--tolerance should be 0 or more, not nan"),
    ],
)
def test_bad_input(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipedream", *command.split()])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert printed.startswith("pipedream: ")
    assert sentence in printed
    assert printed.count("\n") == 1, printed


@pytest.mark.parametrize("command", ["fly", "simulate plan.json --minibatches none", "trace", "train"])
def test_bad_usage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipedream", *command.split()])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "Usage: " in capsys.readouterr().err


def test_a_failed_command_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(sys, "argv", ["pipedream", "partition", "negative.json", *LINKS])
    with pytest.raises(SystemExit):
        main()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_four_ranks_print_one_sentence(folder: Path) -> None:
    finished = ranks.mpirun(4, *PIPEDREAM, "train", JOB, "--plan", "absent.json", timeout=60)
    assert finished.status == 2, finished.output
    assert len(re.findall(r"absent\.json: there is no such file", finished.output)) == 1, finished.output
    assert "Traceback" not in finished.output


def test_a_job_that_exits_on_one_rank_ends_the_others(folder: Path) -> None:
    Path("leaves.py").write_text(
        "import os, sys, time\n"
        "def job(args):\n"
        "    if os.environ['OMPI_COMM_WORLD_RANK'] == '1': sys.exit(3)\n"
        "    time.sleep(3600)\n"
    )
    finished = ranks.mpirun(2, *PIPEDREAM, "train", "leaves.py", "--plan", "2", timeout=60)
    assert finished.status == 3, finished.output


NUMBERS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "2", "4", "-1", "1e9", "1e-3", "nan", "inf", "-inf", "1e400", "2x2", "1,2", "0x", "²"]
    ),
    st.integers(-2, 1 << 20).map(str),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
)
WORDS = st.one_of(st.sampled_from(["1f1b", "gpipe", "ring", "adam", "auto", "l0", "l1,l2", "cluster-a"]), NUMBERS)
OPTIONS = {
    "--devices": st.one_of(st.integers(-1, 40).map(str), st.sampled_from(["2x2", "3x1x2", "x", "2x", "0x4"])),
    "--bandwidth": NUMBERS,
    "--latency": NUMBERS,
    "--memory": NUMBERS,
    "--batch": NUMBERS,
    "--compute-scale": NUMBERS,
    "--n-microbatches": NUMBERS,
    "--cost": WORDS,
    "--schedule": WORDS,
    "--optimizer": WORDS,
    "--recompute": WORDS,
    "--cut-after": WORDS,
    "--together": WORDS,
    "--preset": WORDS,
}
FLAGS = ["--straight", "--fewer", "--json", "--what-if"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    given_options=st.fixed_dictionaries({"--devices": OPTIONS["--devices"], "--bandwidth": OPTIONS["--bandwidth"]})
    .flatmap(lambda first: st.fixed_dictionaries({}, optional=OPTIONS).map(lambda more: {**first, **more}))
    .map(lambda drawn: [f"{name}={value}" for name, value in drawn.items()]),
    flags=st.lists(st.sampled_from(FLAGS), unique=True),
)
def test_any_options_end_in_a_plan_or_a_sentence(
    given_options: list[str], flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    save(profile(), folder / "profile.json")
    words = ["partition", str(folder / "profile.json"), "-o", str(folder / "plan.json"), *given_options, *flags]
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, PipedreamError):
        assert str(result.exception).strip()
        assert "\n" not in str(result.exception)
        return
    assert result.exit_code in (0, 2), (words, result.output, result.exception)
    assert result.exit_code == 0 or "Usage: " in result.output, result.output
