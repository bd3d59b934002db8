"""The examples of configs/hosts/: what they start exists, and says what each process needs to find the others."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import ROOT

from sdxl_eqx.flags import NAMES, parse
from sdxl_eqx.parallel.hosts import SLURM, explicit

FOLDER = ROOT / "configs" / "hosts"
SHELL = ["two_processes.sh", "tpu_pod.sh", "slurm.sbatch"]
ON_TPUS = "replicatedJobs:\n#\n"
"""What stands in jobset.yaml before the variant in comments."""


def jobset() -> dict[str, Any]:
    """The JobSet."""
    return yaml.safe_load((FOLDER / "jobset.yaml").read_text())


def jobset_on_tpus() -> dict[str, Any]:
    """Its variant for TPUs."""
    _, _, comments = (FOLDER / "jobset.yaml").read_text().rpartition(ON_TPUS)
    variant = yaml.safe_load(re.sub(r"^# ?", "", comments, flags=re.MULTILINE))
    whole = jobset()
    whole["metadata"] = variant.pop("metadata")
    whole["spec"] |= variant
    return whole


def job(whole: dict[str, Any]) -> dict[str, Any]:
    """The one kind of job of a JobSet."""
    (found,) = whole["spec"]["replicatedJobs"]
    return found


def container(whole: dict[str, Any]) -> dict[str, Any]:
    """The one container of its pods."""
    (found,) = job(whole)["template"]["spec"]["template"]["spec"]["containers"]
    return found


def commands() -> dict[str, list[str]]:
    """The flags that each example gives to scripts/train.py."""
    found = {}
    for name in SHELL:
        lines = (FOLDER / name).read_text().replace("\\\n", " ").splitlines()
        code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        (command,) = re.findall(r'python scripts/train\.py(.*?)"\$@"', code, re.DOTALL)
        found[name] = shlex.split(command)
    for name, whole in (("jobset.yaml", jobset()), ("jobset.yaml on TPUs", jobset_on_tpus())):
        assert container(whole)["command"] == ["python", "scripts/train.py"]
        found[name] = container(whole)["args"]
    return found


def test_every_example_is_among_those_that_are_checked_here():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted([*SHELL, "jobset.yaml"])


@pytest.mark.parametrize("name", SHELL)
def test_a_shell_script_can_be_parsed(name: str):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


@pytest.mark.parametrize("name", commands())
def test_an_example_gives_flags_that_exist_and_names_its_run_so_that_it_can_go_on(name: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = commands()[name]
    flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    assert flags <= {*NAMES, "config"}
    assert parse(words).run.run_name


def test_two_processes_say_all_that_a_process_must_know():
    text = (FOLDER / "two_processes.sh").read_text()
    said = dict(re.findall(r'^export (JAX_COORDINATOR_ADDRESS|JAX_NUM_PROCESSES)="?(.*?)"?$', text, re.MULTILINE))
    said["JAX_COORDINATOR_ADDRESS"] = said["JAX_COORDINATOR_ADDRESS"].replace("${PORT:-12355}", "12355")
    indices = re.findall(r"^JAX_PROCESS_ID=(\d)", text, re.MULTILINE)
    found = [explicit({**said, "JAX_PROCESS_ID": index}) for index in sorted(indices)]
    assert found == [("localhost:12355", 2, 0), ("localhost:12355", 2, 1)]


def test_pods_of_a_jobset_know_the_first_one_by_its_name_and_themselves_by_their_index():
    whole = jobset()
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["spec"]["network"]["enableDNSHostnames"] is True
    name, pods = whole["metadata"]["name"], job(whole)["template"]["spec"]
    environment = {entry["name"]: entry for entry in container(whole)["env"]}
    index = environment.pop("JAX_PROCESS_ID")["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    said = {key: entry["value"] for key, entry in environment.items()}
    for i in range(pods["completions"]):
        found = explicit({**said, "JAX_PROCESS_ID": str(i)})
        assert found == (f"{name}-{job(whole)['name']}-0-0.{name}:12355", pods["completions"], i)


def test_pods_on_tpus_are_told_nothing_of_the_others():
    whole = jobset_on_tpus()
    assert "env" not in container(whole)
    assert "google.com/tpu" in container(whole)["resources"]["limits"]
    assert "gke-nodepool" in whole["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]


@pytest.mark.parametrize("whole", [jobset(), jobset_on_tpus()], ids=["gpu", "tpu"])
def test_a_jobset_starts_all_pods_of_a_job_and_does_not_repeat_wrong_input(whole: dict[str, Any]):
    pods = job(whole)["template"]["spec"]
    assert pods["parallelism"] == pods["completions"] and pods["completionMode"] == "Indexed"
    assert pods["backoffLimit"] == 0 and pods["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = pods["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container(whole)["name"], "operator": "In", "values": [2]}
    assert whole["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_slurm_starts_a_task_for_each_gpu_by_srun_which_tells_them_of_each_other():
    text = (FOLDER / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert "gpus-per-task" not in options
    assert re.search(r"^srun python scripts/train\.py", text, re.MULTILINE)
    assert "SLURM_STEP_NODELIST" in SLURM and "SLURM_LOCALID" in text


def test_a_pod_of_tpus_runs_the_command_on_every_host(tmp_path: Path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    gcloud.chmod(0o755)
    script, extra = str(FOLDER / "tpu_pod.sh"), ["--prompt", "a cat's picture"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run(["bash", script, *extra], env=path, stdout=subprocess.PIPE, text=True, check=True)
    *options, command = ended.stdout.splitlines()
    assert "--worker=all" in options
    assert shlex.split(command.removeprefix("--command="))[-2:] == extra
