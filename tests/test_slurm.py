"""The batch scripts and modulefiles in slurm/, tested without Slurm.

The batch scripts run on real ranks. Slurm is replaced: `sbatch` below copies the script elsewhere and sets
the job's environment, tests/shims/srun starts the steps with mpirun, and tests/shims/scontrol reports on
the job.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import ranks
import typer.main
from typer.testing import CliRunner

from pipedream_hpc import job
from pipedream_hpc.cli import app
from pipedream_hpc.files import load, save
from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.counting import count
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
SHIMS = Path(__file__).parent / "shims"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
SMALL, MORTAL = ranks.PROGRAMS / "small_job.py", ranks.PROGRAMS / "mortal_job.py"
MODULEFILES = {"lua": "0.1.0.lua", "tcl": "0.1.0"}  # suffix in slurm/, file name when installed
PREFIX = "/opt/deep nets/pipedream"

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def directives(script: Path) -> dict[str, str]:
    """Return names and values of the #SBATCH lines."""
    lines = re.findall(r"^#SBATCH (.*)", script.read_text(), re.MULTILINE)
    return dict((*word.removeprefix("--").split("=", 1), "")[:2] for line in lines for word in shlex.split(line))


def sbatch(
    script: Path, folder: Path, *args: object, tasks_per_node: int = 2, cores: int = 1, **more: str
) -> ranks.Finished:
    """Run a batch script as `sbatch --ntasks-per-node=2 --cpus-per-task=1 script args` would, submitted in `folder`."""
    options = {**directives(script), "ntasks-per-node": str(tasks_per_node), "cpus-per-task": str(cores)}
    tasks = int(options["nodes"]) * tasks_per_node
    environment = {
        "PATH": f"{SHIMS}:{ranks.ENVIRONMENT['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": options["ntasks-per-node"],
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        **more,
    }
    spooled = folder / "spool" / "slurm_script"
    spooled.parent.mkdir(exist_ok=True)
    shutil.copy(script, spooled)
    unset = [word for name in os.environ if name.startswith(("SLURM_", "RUN")) for word in ("-u", name)]
    assigned = [f"{name}={value}" for name, value in environment.items()]
    return ranks.without_launcher("env", "-C", folder, *unset, *assigned, "bash", spooled, *args, timeout=240)


def steps(output: str) -> list[str]:
    """Return the steps that srun started, with their options."""
    return re.findall(r"^step: (.*)", output, re.MULTILINE)


def epochs(output: str) -> list[str]:
    """Return the lines about epochs, without their times."""
    return re.findall(r"^epoch \d+  loss \S+  test accuracy \S+", output, re.MULTILINE)


# --- batch scripts -----------------------------------------------------------------------------------


@each_script
def test_a_script_has_no_syntax_error(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_scripts_differ_only_in_their_slurm_options() -> None:
    one, several = (script.read_text().split("set -Eeuo pipefail") for script in SCRIPTS)
    assert [script.stem for script in SCRIPTS] == ["one-node", "several-nodes"]
    assert one[1].replace("All files of this run.", "") == several[1].replace(
        "All files of this run: a folder that every node sees.", ""
    )


@pytest.mark.parametrize("text", [*SCRIPTS, SLURM / "README.md"], ids=lambda path: path.name)
def test_scripts_and_readme_use_only_existing_options(text: Path) -> None:
    group = typer.main.get_command(app)
    shown = re.findall(r"(?:^ *|on_ranks |`)pipedream ([a-z]+)([^`\n]*)", text.read_text(), re.MULTILINE)
    assert shown
    for name, words in shown:
        parameters = group.commands[name].params  # type: ignore[attr-defined]
        known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in shlex.split(words) if word.startswith("-")} <= known, words


def test_a_job_from_profile_to_trained(tmp_path: Path) -> None:
    """The other script's commands are identical."""
    script = SLURM / "several-nodes.sbatch"
    tasks_per_node = 2 // int(directives(script)["nodes"])
    finished = sbatch(script, tmp_path, SMALL, "--", "--width", "12", tasks_per_node=tasks_per_node)
    assert finished.status == 0, finished.output
    how = "mpi=pmix kill=1 cores=1 tasks=2: pipedream"
    assert steps(finished.output) == [f"{how} profile", f"{how} probe", f"{how} train"]
    assert [line.split()[1] for line in epochs(finished.output)] == ["0", "1"]
    run = tmp_path / directives(script)["job-name"]
    assert load(Topology, run / "topology.json").devices == load(Plan, run / "plan.json").ranks == 2
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "out",
        "plan.json",
        "profile.json",
        "topology.json",
    ]


def test_a_requeued_job_continues(tmp_path: Path) -> None:
    """Rank 0 is killed in epoch 1 and the job fails. Started again, it has the results of an uninterrupted run."""
    script, run, small = SLURM / "one-node.sbatch", tmp_path / "kept", job.load(str(SMALL))
    two = Topology((Level("node", 2, 0.0, 1e9),), device="cpu")
    save(solve(count(capture(small.model, small.example_inputs)), two, Request(straight=True)), run / "plan.json")
    first = sbatch(script, tmp_path, MORTAL, RUN=str(run), MORTAL="0")
    assert first.status != 0, first.output
    assert "requeued" not in first.output
    assert steps(first.output) == ["mpi=pmix kill=1 cores=1 tasks=2: pipedream train"]  # the plan is taken as it is
    assert [line.split()[1] for line in epochs(first.output)] == ["0"], first.output

    second = sbatch(script, tmp_path, MORTAL, RUN=str(run), SLURM_RESTART_COUNT="1")
    assert second.status == 0, second.output
    assert steps(second.output) == ["mpi=pmix kill=1 cores=1 tasks=2: pipedream train"]
    assert "the checkpoint has 1 of 2 epochs: continuing with epoch 1" in second.output

    words = ("train", str(MORTAL), "--plan", str(run / "plan.json"), "--out", str(tmp_path / "alone"))
    straight_on = CliRunner().invoke(app, words, catch_exceptions=False)
    assert epochs(first.output) + epochs(second.output) == epochs(straight_on.output)

    third = sbatch(script, tmp_path, MORTAL, RUN=str(run))
    assert third.status == 0, third.output
    assert "the checkpoint has 2 of 2 epochs: nothing left to train" in third.output


def test_a_preempted_job_requeues_itself(tmp_path: Path) -> None:
    """SIGTERM has ended its ranks, so the script ends before Slurm would requeue it."""
    finished = sbatch(SLURM / "several-nodes.sbatch", tmp_path, "no such job.py", PREEMPT_TIME="2030-01-01T00:01:00")
    assert finished.status != 0
    assert "no such file" in finished.output
    assert "requeued: 17" in finished.output


def test_an_srun_that_does_not_support_the_mpi(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.sbatch"
    wrong.write_text((SLURM / "one-node.sbatch").read_text().replace("--mpi=pmix", "--mpi=none"))
    finished = sbatch(wrong, tmp_path, SMALL, cores=3)
    assert finished.status == 2, finished.output
    assert steps(finished.output) == ["mpi=none kill=1 cores=3 tasks=2: pipedream profile"]
    assert finished.output.count("pipedream: ") == 1, finished.output
    assert re.search(r"pipedream: srun started 2 tasks, but MPI \(.+\) sees only this one", finished.output)
    assert "use `srun --mpi=pmix`" in finished.output
    assert "`srun --mpi=list` shows what this Slurm supports" in finished.output


# --- modules -----------------------------------------------------------------------------------------


def install(ending: str, modules: Path) -> Path:
    """Install a modulefile with the sed command of slurm/README.md."""
    (command,) = re.findall(r"^ +(sed -e .*?) modulefile\.lua", (SLURM / "README.md").read_text(), re.MULTILINE)
    installed = modules / "pipedream-hpc" / MODULEFILES[ending]
    installed.parent.mkdir()
    with installed.open("w") as file:
        words = [word.replace("|PREFIX|", f"|{PREFIX}|") for word in shlex.split(command)]
        subprocess.run([*words, SLURM / f"modulefile.{ending}"], stdout=file, check=True)
    return installed


@pytest.mark.parametrize("ending", MODULEFILES)
def test_a_modulefile_sets_the_environment(ending: str, tmp_path: Path) -> None:
    text = install(ending, tmp_path).read_text()
    assert "@" not in text
    shapes = {
        "lua": (r'^setenv\("(\w+)", "(.*)"\)$', r'^prepend_path\("(\w+)", "(.*)"\)$'),
        "tcl": (r"^setenv (\w+) {(.*)}$", r"^prepend-path (\w+) {(.*)}$"),
    }[ending]
    assert re.findall(shapes[0], text, re.MULTILINE) == [("PIPEDREAM_HPC_ROOT", PREFIX)]
    assert re.findall(shapes[1], text, re.MULTILINE) == [("PATH", f"{PREFIX}/bin")]


@pytest.mark.parametrize("ending", MODULEFILES)
def test_lmod_loads_a_modulefile(ending: str, tmp_path: Path) -> None:
    lmod = Path(os.environ.get("LMOD_CMD", "/usr/share/lmod/lmod/libexec/lmod"))
    if not lmod.exists():
        pytest.skip("no Lmod here")
    install(ending, tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MODULEPATH": str(tmp_path)}
    command = [lmod, "bash", "load", "pipedream-hpc"]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    script = f'{loaded.stdout}\necho "$PATH"; echo "$PIPEDREAM_HPC_ROOT"'
    shell = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines()[-2:] == [f"{PREFIX}/bin:/usr/bin:/bin", PREFIX], loaded.stderr


def test_tcl_reads_its_modulefile(tmp_path: Path) -> None:
    if shutil.which("tclsh") is None:
        pytest.skip("no Tcl here")
    commands = ("module-whatis", "conflict", "setenv", "prepend-path")
    stubs = "".join(f"proc {name} args {{ puts [join [list {name} {{*}}$args] |] }}\n" for name in commands)
    program = f"{stubs}source {install('tcl', tmp_path)}\nModulesHelp\n"
    finished = subprocess.run(["tclsh"], input=program, capture_output=True, text=True, check=True)
    lines = finished.stdout.splitlines()
    assert f"setenv|PIPEDREAM_HPC_ROOT|{PREFIX}" in lines
    assert f"prepend-path|PATH|{PREFIX}/bin" in lines
    assert "Start with: pipedream --help" in finished.stderr
