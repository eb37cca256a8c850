"""The caregrid command. Heavy imports stand inside the commands, so that ``caregrid --help`` answers at once."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from caregrid.errors import CaregridError, WorkflowInvalid

if TYPE_CHECKING:
    from caregrid.domain.study import StudyRef
    from caregrid.site import Site

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Run AI in everyday hospital care.")


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=text)
    app.add_typer(group, name=name)
    return group


site_app = _group("site", "A hospital's site: make it, start it, see how it stands.")
study_app = _group("study", "Received studies.")
run_app = _group("run", "Runs of workflows.")
delivery_app = _group("delivery", "Results on their way to destinations.")
model_app = _group("model", "Signed model packages.")
workflow_app = _group("workflow", "Clinical workflows.")
audit_app = _group("audit", "The audit log.")
user_app = _group("user", "Local users of the web pages.")

Home = Annotated[Path, typer.Option("--home", envvar="CAREGRID_HOME", help="The site's folder.")]
Why = Annotated[str, typer.Option("--why", help="The reason, for the audit log.")]
HERE = Path()


def _who() -> str:
    return f"cli:{getpass.getuser()}"


def _open(home: Path) -> Site:
    from caregrid.site import Site

    return Site.open(home)


def _table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(*columns)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    if rows:
        console.print(table)


# site ---------------------------------------------------------------------------------------------------------------


@site_app.command("init")
def site_init(
    path: Annotated[Path, typer.Argument(help="Folder of the new site.")],
    name: Annotated[str, typer.Option(help="The hospital's name, as results will carry it.")] = "My Hospital",
    database: Annotated[str, typer.Option(help="postgresql+psycopg://… ; default SQLite in the site's folder.")] = "",
    builtin: Annotated[bool, typer.Option(help="Add, sign and activate the algorithms that come with caregrid.")] = True,
) -> None:
    """Make a site: settings file, keys, database, the built-in algorithms and an admin user."""
    from caregrid.setup import init_site

    made = init_site(path, name, database, builtin=builtin, who=_who())
    typer.echo(f"Site made at {made.home}")
    for model in made.models:
        typer.echo(f"  model {model} added, signed and active")
    for reason in made.left_out:
        typer.echo(f"  left out: {reason}")
    typer.echo(f"  web user admin, password {made.admin_password} (shown once; change it at first login)")
    typer.echo(f"Next: edit {made.home / 'site.toml'}, then: caregrid site start --home {made.home}")


@site_app.command("start")
def site_start(
    home: Home = HERE, workers: Annotated[int, typer.Option(help="Worker processes; 0: as site.toml says.")] = 0
) -> None:
    """Start the site and keep it going until stopped (Ctrl-C)."""
    from caregrid.logs import set_up
    from caregrid.site import Keeper

    set_up()
    site = _open(home)
    site.prepare()
    settings = site.settings
    site.close()
    scheme = "https" if settings.web.tls else "http"
    typer.echo(f"{settings.name}: DICOM on port {settings.dimse.port} ({', '.join(settings.dimse.ae_titles)}), ", nl=False)
    typer.echo(f"pages at {scheme}://{settings.web.host}:{settings.web.port}/")
    Keeper(settings, workers).run()


@site_app.command("part", hidden=True)
def site_part(role: str, home: Home = HERE) -> None:
    """Be one of the site's processes (used by ``site start``, and to spread workers over machines)."""
    from caregrid.logs import set_up

    set_up()
    site = _open(home)
    try:
        site.run(role)
    finally:
        site.close()


@site_app.command("status")
def site_status(home: Home = HERE, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Processes alive, studies and runs by state, what waits, what is parked."""
    from caregrid.store.status import status

    with_site = _open(home)
    facts = status(with_site.engine, with_site.settings.engine.dead_after_seconds)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for title, counts in facts.items():
        _table(title, ["what", "count"], [[key, value] for key, value in counts.items()] or [["none", 0]])


@app.command("send")
def send(
    paths: Annotated[list[Path], typer.Argument(help="DICOM files or folders.")],
    to: Annotated[str, typer.Option(help="host:port of the receiver.")] = "127.0.0.1:11112",
    called: Annotated[str, typer.Option(help="Called AE title.")] = "CAREGRID",
    calling: Annotated[str, typer.Option(help="Calling AE title.")] = "CAREGRID-SCU",
) -> None:
    """Send DICOM files by C-STORE and say what the receiver answered for each."""
    from rich.progress import track

    from caregrid.domain.settings import Destination
    from caregrid.results.cstore import send as cstore

    host, _, port = to.rpartition(":")
    destination = Destination(name=called, kind="cstore", host=host, port=int(port), ae_title=called, calling_ae=calling)
    files = sorted(file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    refused = 0
    batches = [files[start : start + 50] for start in range(0, len(files), 50)]
    for batch in track(batches, description="Sending", disable=not sys.stderr.isatty()):
        for answer in cstore(destination, batch):
            if not answer.accepted:
                refused += 1
                typer.echo(f"refused {answer.sop_instance_uid}: {answer.status}", err=True)
    typer.echo(f"{len(files) - refused} of {len(files)} accepted by {called}")
    raise typer.Exit(1 if refused else 0)


# study --------------------------------------------------------------------------------------------------------------


@study_app.command("list")
def study_list(home: Home = HERE, state: Annotated[str, typer.Option(help="Only this state.")] = "", limit: int = 50) -> None:
    """The latest studies: UID, state and reason. No patient data is shown."""
    from caregrid.store.status import latest_studies

    rows = latest_studies(_open(home).engine, state, limit)
    _table("Studies", ["Study Instance UID", "modalities", "instances", "state", "reason"], rows)


@study_app.command("show")
def study_show(study_uid: str, home: Home = HERE) -> None:
    """A study's whole story: completion, verdicts, runs, tasks, deliveries."""
    from caregrid.store.status import study_story

    for title, columns, rows in study_story(_open(home).engine, study_uid):
        _table(title, columns, rows)


@study_app.command("release")
def study_release(study_uid: str, why: Why, home: Home = HERE, cancel: bool = False) -> None:
    """Let a held study go on with what is there (or cancel it)."""
    from caregrid.engine.completion import release

    release(_open(home).engine, study_uid, not cancel, _who(), why)
    typer.echo("cancelled" if cancel else "released")


@study_app.command("rerun")
def study_rerun(study_uid: str, why: Why, home: Home = HERE) -> None:
    """Judge and run a study again; new results get new UIDs."""
    from caregrid.engine.completion import rerun

    rerun(_open(home).engine, study_uid, _who(), why)
    typer.echo("the study will be judged again")


# run, delivery ------------------------------------------------------------------------------------------------------


@run_app.command("retry")
def run_retry(run_id: str, why: Why, home: Home = HERE) -> None:
    """Start a failed, parked or cancelled run again where it stopped."""
    from caregrid.engine.runs import retry

    site = _open(home)
    retry(site.engine, site.queue, run_id, _who(), why)
    typer.echo("queued")


@run_app.command("cancel")
def run_cancel(run_id: str, why: Why, home: Home = HERE) -> None:
    """Stop a run."""
    from caregrid.engine.runs import cancel

    site = _open(home)
    cancel(site.engine, site.queue, run_id, _who(), why)
    typer.echo("cancelled")


@run_app.command("withdraw")
def run_withdraw(
    run_id: str, why: Why, home: Home = HERE, reason: Annotated[str, typer.Option(help="quality or safety")] = "quality"
) -> None:
    """Take a run's results back, with a rejection note to wherever they went."""
    count = _open(home).withdrawal().withdraw(run_id, _who(), why, reason)
    typer.echo(f"{count} objects withdrawn")


@delivery_app.command("list")
def delivery_list(home: Home = HERE, state: str = "parked", limit: int = 50) -> None:
    """Deliveries by state (pending, sending, delivered, parked, cancelled)."""
    from caregrid.store.status import latest_deliveries

    rows = latest_deliveries(_open(home).engine, state, limit)
    _table(f"Deliveries: {state}", ["id", "run", "destination", "attempts", "last error", "next attempt"], rows)


@delivery_app.command("resend")
def delivery_resend(delivery_id: int, why: Why, home: Home = HERE) -> None:
    """Send an object again, with the same UIDs."""
    from caregrid.engine.outbox import resend

    resend(_open(home).engine, delivery_id, _who(), why)
    typer.echo("it will be sent again")


# model --------------------------------------------------------------------------------------------------------------


@model_app.command("add")
def model_add(folder: Path, why: Why = "added", home: Home = HERE) -> None:
    """Take a model package in; it does not run until it is signed by a key the site trusts, and activated."""
    manifest = _open(home).registry.add(folder, _who(), why)
    typer.echo(f"{manifest.reference} added, sha256 {manifest.digest}")


@model_app.command("keygen")
def model_keygen(name: str, folder: Annotated[Path, typer.Option(help="Where the two PEM files go.")] = HERE) -> None:
    """Make an Ed25519 key pair: <name>.key (keep it safe) and <name>.pub."""
    from caregrid.registry.signing import new_keypair

    private, public = new_keypair()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f"{name}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(private)
    (folder / f"{name}.pub").write_bytes(public)
    typer.echo(f"{folder / name}.key and .pub made")


@model_app.command("trust")
def model_trust(public_key: Path, name: str, why: Why, home: Home = HERE) -> None:
    """Trust a public key at this site."""
    key_id = _open(home).registry.trust(public_key.read_bytes(), name, _who(), why)
    typer.echo(f"key {key_id} trusted as {name}")


@model_app.command("sign")
def model_sign(
    name: str,
    version: str,
    key: Annotated[Path, typer.Option(help="Private key, PEM.")],
    why: Why,
    home: Home = HERE,
    days: Annotated[int, typer.Option(help="Days the signature holds.")] = 365,
    activate: Annotated[bool, typer.Option(help="Activate it at once.")] = True,
) -> None:
    """Sign a model of the registry."""
    registry = _open(home).registry
    registry.sign(name, version, key.read_bytes(), key.stem, _who(), why, days)
    if activate:
        registry.activate(name, version, _who(), why)
    typer.echo(f"{name} {version} signed{' and active' if activate else ''}")


@model_app.command("verify")
def model_verify(name: str, version: str, home: Home = HERE) -> None:
    """Check signature, key, expiry and every file."""
    manifest = _open(home).registry.verify(name, version)
    typer.echo(f"{manifest.reference}: signature holds, sha256 {manifest.digest}")


@model_app.command("retire")
def model_retire(name: str, version: str, why: Why, home: Home = HERE) -> None:
    """No new run uses it; runs under way keep it."""
    _open(home).registry.retire(name, version, _who(), why)
    typer.echo(f"{name} {version} retired")


@model_app.command("activate")
def model_activate(name: str, version: str, why: Why, home: Home = HERE) -> None:
    """Let new runs use a signed model (again)."""
    _open(home).registry.activate(name, version, _who(), why)
    typer.echo(f"{name} {version} is active")


@model_app.command("revoke")
def model_revoke(key_id: str, why: Why, home: Home = HERE) -> None:
    """Trust a key no longer: what it signed does not run any more. The key's id, or its first eight characters or more."""
    _open(home).registry.revoke(key_id, _who(), why)
    typer.echo(f"key {key_id} revoked")


@model_app.command("list")
def model_list(home: Home = HERE) -> None:
    """Every model of the registry."""
    rows = [
        [each.name, each.version, each.state, each.signed_by, (each.expires_at or "")[:10], each.digest[:12]]
        for each in _open(home).registry.list()
    ]
    _table("Models", ["name", "version", "state", "signed by", "until", "digest"], rows)


@model_app.command("environment")
def model_environment(name: str, requirements: Path, home: Home = HERE) -> None:
    """Make a private Python environment for packages whose pins would clash with others."""
    from caregrid.registry.environments import create_environment

    site = _open(home)
    made = create_environment(site.settings.data / "environments" / name, requirements)
    typer.echo(f"environment {name} made at {made}")


# workflow -----------------------------------------------------------------------------------------------------------


@workflow_app.command("validate")
def workflow_validate(file: Path) -> None:
    """Check a workflow file; every problem with its line."""
    from caregrid.engine.workflows import parse_workflow, warnings

    workflow = parse_workflow(file.read_text("utf-8"), str(file))
    for warning in warnings(workflow):
        typer.echo(f"warning: {warning}")
    typer.echo(f"{workflow.name}: {len(workflow.tasks)} tasks, revision {workflow.revision}")


@workflow_app.command("add")
def workflow_add(file: Path, why: Why, home: Home = HERE) -> None:
    """Validate a workflow and make it the active revision. Runs under way keep theirs."""
    from caregrid.engine.judge import add_workflow

    workflow = add_workflow(_open(home).engine, file.read_text("utf-8"), str(file), _who(), why)
    typer.echo(f"{workflow.name} revision {workflow.revision} is active")


@workflow_app.command("retire")
def workflow_retire(name: str, why: Why, home: Home = HERE) -> None:
    """Start no new run of a workflow."""
    from caregrid.engine.judge import retire_workflow

    retire_workflow(_open(home).engine, name, _who(), why)
    typer.echo(f"{name} retired")


@workflow_app.command("list")
def workflow_list(home: Home = HERE) -> None:
    """The active workflows."""
    from caregrid.engine.judge import active_workflows
    from caregrid.store.database import reading

    with reading(_open(home).engine) as connection:
        rows = [[each.name, each.revision, each.priority, len(each.tasks), each.owner] for each in active_workflows(connection)]
    _table("Workflows", ["name", "revision", "priority", "tasks", "owner"], rows)


@workflow_app.command("explain")
def workflow_explain(study_uid: str, home: Home = HERE) -> None:
    """Why each workflow ran, or did not, for a study."""
    from caregrid.store.status import verdicts

    for title, columns, rows in verdicts(_open(home).engine, study_uid):
        _table(title, columns, rows)


@workflow_app.command("test")
def workflow_test(
    file: Annotated[Path, typer.Argument(help="A DICOM file.")],
    workflow: Annotated[
        list[Path], typer.Option("--workflow", "-w", help="Workflow files; default: the site's active ones.")
    ] = [],  # noqa: B006
    home: Home = HERE,
    called_ae: str = "CAREGRID",
    calling_ae: str = "TEST",
) -> None:
    """What each workflow would say to a study made of one file."""
    import pydicom

    from caregrid.engine.judge import active_workflows
    from caregrid.engine.workflows import parse_workflow, test_file
    from caregrid.store.database import reading

    if workflow:
        flows = [parse_workflow(each.read_text("utf-8"), str(each)) for each in workflow]
    else:
        with reading(_open(home).engine) as connection:
            flows = active_workflows(connection)
    header = pydicom.dcmread(file, stop_before_pixels=True)
    for flow in flows:
        verdict = test_file(flow, header, called_ae=called_ae, calling_ae=calling_ae)
        rows = [[line] for line in verdict.trail]
        _table(f"{flow.name}: {'applies' if verdict.applies else 'does not apply'} — {verdict.reason}", ["judged"], rows)


@workflow_app.command("dry-run")
def workflow_dry_run(
    file: Annotated[Path, typer.Argument(help="A workflow file.")],
    since: Annotated[str, typer.Option(help="Stored studies since this date (YYYY-MM-DD).")] = "",
    home: Home = HERE,
) -> None:
    """On how many stored studies a workflow would have run, and why not on the others. Nothing is run."""
    from rich.progress import track

    from caregrid.engine.judge import cached_headers
    from caregrid.engine.workflows import dry_run, parse_workflow
    from caregrid.store.database import reading
    from caregrid.store.status import study_uids_since
    from caregrid.store.studies import load_study

    site, flow = _open(home), parse_workflow(file.read_text("utf-8"), str(file))

    def stored() -> Iterator[StudyRef]:
        for uid in track(study_uids_since(site.engine, since), description="Judging", disable=not sys.stderr.isatty()):
            with reading(site.engine) as connection:
                yield load_study(connection, site.folder, uid)

    done = dry_run(flow, stored(), cached_headers(512))
    reasons = Counter(verdict.reason for _, verdict in done.verdicts)
    rows = [[count, reason] for reason, count in reasons.most_common()]
    _table(f"{flow.name} would have run on {done.would_fire} of {done.total} studies", ["studies", "reason"], rows)


@workflow_app.command("import-monai")
def workflow_import_monai(file: Path, output: Annotated[Path, typer.Option("--output", "-o")] = Path("workflow.yaml")) -> None:
    """Turn a MONAI Deploy or AIDE workflow (JSON) into ours, with a report of what has no equivalent."""
    from caregrid.engine.monai_import import import_monai

    imported = import_monai(file.read_text("utf-8"))
    output.write_text(imported.yaml, "utf-8")
    _table(f"{file.name} → {output}", ["", "what", "why"], [[line.kind, line.what, line.why] for line in imported.report])


# audit, user, doctor, demo ------------------------------------------------------------------------------------------


@audit_app.command("verify")
def audit_verify(home: Home = HERE, head: Annotated[str, typer.Option(help="seq:hash kept elsewhere.")] = "") -> None:
    """Walk the hash chain; print its head so that a copy can be kept off the machine."""
    from caregrid.store import audit
    from caregrid.store.database import reading

    seq, _, digest = head.partition(":")
    with reading(_open(home).engine) as connection:
        count, last = audit.verify(connection, (int(seq), digest) if digest else None)
    typer.echo(f"{count} records hold; head {count}:{last}")


@user_app.command("add")
def user_add(
    name: str,
    role: Annotated[list[str], typer.Option(help="clinician, operator, governance, admin; may be given several times.")],
    home: Home = HERE,
    full_name: str = "",
    password_stdin: Annotated[bool, typer.Option(help="Read the password from standard input.")] = False,
) -> None:
    """Add a local user of the web pages."""
    from caregrid.store.users import create_user

    password = (
        sys.stdin.readline().rstrip("\n")
        if password_stdin
        else typer.prompt("Password", hide_input=True, confirmation_prompt=True)
    )
    create_user(_open(home).engine, name, password, role, full_name=full_name, who=_who(), why="added at the command line")
    typer.echo(f"user {name} added")


@app.command("doctor")
def doctor(home: Home = HERE) -> None:
    """Probe the machine: sandbox, containers, tools, disk, decoders; what is missing and how to mend it."""
    from caregrid.config import FILE
    from caregrid.runtime.doctor import probe

    folder = _open(home).settings.data if (home / FILE).is_file() else home
    checks = probe(folder)
    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}
    _table(
        "This machine", ["", "check", "says", "to mend"], [[marks[each.ok], each.name, each.says, each.remedy] for each in checks]
    )
    raise typer.Exit(1 if any(each.ok is False for each in checks) else 0)


@app.command("demo")
def demo(
    output: Annotated[Path, typer.Option(help="Where the demo's site, PACS and pictures go.")] = Path("demo-out"),
    keep: Annotated[bool, typer.Option(help="Keep the site and its pages running at the end.")] = False,
) -> None:
    """A site and a small PACS on this machine: real studies in, results in PACS, pictures and pages."""
    from caregrid.demo.demo import run_demo

    run_demo(output, keep=keep)


def _told(error: CaregridError) -> list[str]:
    """One line, or one per problem of a workflow file."""
    if isinstance(error, WorkflowInvalid) and len(error.problems) > 1:
        return [f"{error.details.get('file')}:{line}: {reason}" for line, reason in error.problems]
    return [error.message]


def main() -> None:
    """Entry point: a named error becomes one line and its own exit code."""
    try:
        app()
    except CaregridError as error:
        for line in _told(error):
            typer.echo(f"{type(error).__name__}: {line}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
