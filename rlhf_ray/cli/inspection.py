"""Commands that inspect a config, a run or a machine."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.cli.arguments import (
    AsJson,
    ConfigPath,
    Overrides,
    Port,
    policies_at,
    print_json,
    read_config,
    split_versions,
)
from rlhf_ray.config import Config, dump
from rlhf_ray.secrecy import printable

app = typer.Typer()

CHECK = "Check a config or a machine"
SHOW = "Look at a run"


class Choice(StrEnum):
    """Which pairs people are shown."""

    random = "random"
    uncertain = "uncertain"
    disagreement = "disagreement"


@app.command(
    rich_help_panel=CHECK, epilog="Example: rlhf-ray plan config.yaml --cluster 3x8xA100-80GB"
)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NODESxGPUSxKIND",
            help="Cluster to plan for, such as 3x8xA100-80GB or 8xA100-80GB+2x4xL40S-48GB; 'live' "
            "is the running Ray cluster. Default: live if the run would join it, else this "
            "machine.",
        ),
    ] = None,
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize",
            help="Search the layouts that fit for the fewest days and the fewest GPU-hours. "
            "Overrides given here stay as they are.",
        ),
    ] = False,
    with_config: Annotated[
        bool, typer.Option("--config", help="Show the resolved config behind the plan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, placement and run time of a config, and what each stage takes.

    The exit code is 1 if the config does not fit on the cluster. Nothing is started.
    """
    from rlhf_ray.planning import tables
    from rlhf_ray.planning.plan import plan_for

    kept = [override.partition("=")[0] for override in overrides or []] if optimize else None
    estimate, changes, layouts = plan_for(read_config(config, overrides), cluster, kept)
    if as_json:
        print_json(tables.as_json(estimate, changes, layouts))
    else:
        typer.echo(tables.as_text(estimate, changes, layouts))
        if with_config:
            typer.echo(f"\n{dump(estimate.config).rstrip()}")
    raise typer.Exit(0 if estimate.fits else 1)


@app.command(rich_help_panel=SHOW)
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the HTML report of a run, finished or not, to report.html in its folder."""
    from rlhf_ray.report.report import build

    typer.echo(f"Report: {build(Path(read_config(config, overrides).run.dir))}")


@app.command(rich_help_panel=SHOW, epilog="Example: rlhf-ray compare runs/a runs/b --out ab.html")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of two runs or more.")
    ],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("comparison.html"),
) -> None:
    """Lay runs beside each other on a page: outcomes, win rates, curves, config differences."""
    from rlhf_ray.report.comparison import build

    typer.echo(f"Comparison: {build(runs, out)}")


@app.command(rich_help_panel=SHOW, epilog="Example: rlhf-ray view runs/quickstart")
def view(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder; a copy will do.")],
    port: Port = 0,
) -> None:
    """Browse a run's samples in a web page on this machine, also while it runs.

    Samples over time with their scores, KL and length, their tokens coloured by advantage, KL or
    log-prob mismatch, a prompt across versions, the guards' warnings, and the run's curves.
    run.record says how many samples a run keeps. The page is on loopback, behind the token in its
    address.
    """
    from rlhf_ray.web.server import serve
    from rlhf_ray.web.view import Viewer

    serve(Viewer(run).routes(), port, typer.echo)


@app.command(rich_help_panel=SHOW, epilog="Example: rlhf-ray rank runs/quickstart@10,latest")
def rank(
    run: Annotated[
        Path, typer.Argument(metavar="RUN[@VERSIONS]", help="A run's folder; a copy will do.")
    ],
    port: Port = 0,
    choice: Annotated[
        Choice,
        typer.Option(
            help="Pairs of the evaluation to show: random ones, those with the smallest difference "
            "of rewards, or those on which a judge and the rewards disagree."
        ),
    ] = Choice.random,
    num: Annotated[int, typer.Option(min=1, help="Most pairs to make.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the order of the pairs.")] = 0,
    address: Annotated[
        str | None,
        typer.Option(
            help="Cluster that has the run, http://HOST:8265: print the commands that serve the "
            "page there and bring it here, and serve nothing."
        ),
    ] = None,
) -> None:
    """Let people rank pairs of a run's answers in a web page on this machine.

    A person gives a name and sees a prompt and two answers, without their models and in random
    order. Keys say which is better; every verdict is saved at once, in rank/preferences.jsonl.
    Several people may rank one run; pairs on which they differ are shown again. The pairs are those
    of rank/pairs.jsonl, else they are made of the answers of the run's evaluation.
    RUN@100,latest samples answers of versions of the policy to held-out prompts first, and shows
    those pairs before the others; RUN@100 compares with the SFT model. The page is on loopback,
    behind the token in its address.
    """
    from rlhf_ray.web.rank import RankPages, prepare_pairs, tunnels
    from rlhf_ray.web.server import serve

    if address is not None:
        from rlhf_ray.jobs.connection import driver_host

        typer.echo(tunnels(run, address, port, *driver_host(str(split_versions(run)[0]), address)))
        return
    run, versions = split_versions(run)
    if versions:
        _add_pairs(run, versions, num, seed)
    else:
        prepare_pairs(run, choice.value, num, seed)
    pages = RankPages(run)
    if problem := pages.damage():
        typer.echo(problem, err=True)
    serve(pages.routes(), port, typer.echo)


def _add_pairs(run: Path, versions: Sequence[str], num: int, seed: int) -> None:
    """Sample pairs of answers of a run's versions, and put them before those that it has."""
    from rlhf_ray.people.pairs import choose_pairs, read_pairs, write_pairs
    from rlhf_ray.serving.generate import sampled_pairs

    models = [*(["sft"] if len(versions) == 1 else []), *policies_at(versions)]
    new = choose_pairs(sampled_pairs(read_config(run), models, num), "random", num, seed)
    write_pairs(run, [*{pair.id: pair for pair in (*new, *read_pairs(run))}.values()])


@app.command(rich_help_panel=SHOW, epilog="Example: rlhf-ray replay runs/quickstart --iteration 12")
def replay(
    config: ConfigPath,
    overrides: Overrides = None,
    iteration: Annotated[
        int | None,
        typer.Option(min=1, help="Iteration of PPO. Default: the last whose batch is kept."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run one learning step of PPO again, alone, and compare it with what the run recorded.

    It starts from the commit before the step, in this process: no Ray, generators or rewards are
    started. run.keep_batches says of which iterations a run keeps what that takes: by default the
    last one, and those that a guard warned of. Overrides show what the step would have been.

    The step is reproduced bit for bit where the run was one process (cluster.mode inline), within
    1e-5 after DeepSpeed or several ranks, on the same kind of device; else the exit code is 1.
    """
    from rlhf_ray.stages.ppo import replay as step

    changes = [override for override in overrides or [] if not override.startswith("run.")]
    result = step.run(read_config(config, overrides), iteration, changes)
    if as_json:
        print_json(step.as_mapping(result))
    else:
        typer.echo(step.as_text(result, changes))
    raise typer.Exit(0 if result.is_reproduced or changes else 1)


@app.command(
    rich_help_panel=SHOW, epilog="Example: rlhf-ray bisect runs/my-run --when 'repetition > .1'"
)
def bisect(
    config: ConfigPath,
    when: Annotated[
        str,
        typer.Option(
            help="One metric, one of > >= < <=, and a number: 'objective/kl > 20'. repetition, "
            "length, kl, score and entropy are short names; file.py:name is a function of yours."
        ),
    ],
    overrides: Overrides = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="Held-out prompts for a metric that was not logged.")
    ] = 16,
    num: Annotated[int, typer.Option(min=1, help="Rollouts to show.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Find the first version of a policy for which a condition holds, and what taught it.

    A logged metric is looked up. Another one is measured on held-out prompts, for as few of the
    kept versions as a binary search takes. The exit code is 1 if the condition holds for none.
    """
    from rlhf_ray.serving import bisect as search

    find = search.run(read_config(config, overrides), when, num_prompts=prompts, num_rollouts=num)
    if as_json:
        print_json(search.as_mapping(find))
    else:
        typer.echo(printable(search.as_text(find, str(config))))
    raise typer.Exit(0 if find.first is not None else 1)


@app.command(rich_help_panel=SHOW)
def dashboards(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("dashboards"),
    no_commit_minutes: Annotated[
        float,
        typer.Option(
            min=1, help="Raise an alert when a run has not committed for this long, minutes."
        ),
    ] = 60.0,
    max_kl: Annotated[
        float,
        typer.Option(min=0, help="Raise an alert when the KL to the reference exceeds this, nats."),
    ] = 50.0,
    kubernetes: Annotated[
        bool,
        typer.Option(
            "--kubernetes",
            help="Write manifests for the Prometheus operator and Grafana of a Kubernetes cluster.",
        ),
    ] = False,
    release: Annotated[
        str,
        typer.Option(help="Label by which that Prometheus finds monitors and rules: its release."),
    ] = "prometheus",
) -> None:
    """Write a Grafana dashboard and a Prometheus configuration with alert rules."""
    from rlhf_ray.observability.dashboards.files import write, write_for_kubernetes
    from rlhf_ray.observability.dashboards.prometheus import Bounds

    bounds = Bounds(no_commit_minutes, max_kl)
    typer.echo(write_for_kubernetes(out, bounds, release) if kubernetes else write(out, bounds))


@app.command(rich_help_panel=CHECK, epilog="Example: rlhf-ray doctor config.yaml --cluster")
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="Also check this config's folder, models and data."),
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Check every node of the Ray cluster, not this machine."),
    ] = False,
    min_bandwidth: Annotated[
        float, typer.Option(min=0.0, help="Minimum bandwidth between any two nodes, Gbit/s.")
    ] = 1.0,
) -> None:
    """Check this machine, or every node of a Ray cluster, and say what to fix."""
    from rlhf_ray.doctor import preflight
    from rlhf_ray.doctor.environment import check_environment
    from rlhf_ray.doctor.token_files import check_token_files

    resolved = read_config(config, overrides) if config else None

    if not cluster:
        code = preflight.main(["--installed"])
        checks = [check_token_files(), *check_environment(resolved)]
        typer.echo(preflight.format_table(checks))
        is_broken = any(check.verdict == preflight.FAIL for check in checks)
        raise typer.Exit(code or 2 * is_broken)
    from rlhf_ray.doctor import cluster as cluster_doctor

    sections, is_healthy = cluster_doctor.run(resolved, min_bandwidth)
    for title, checks in sections:
        typer.echo(f"{title}:\n{preflight.format_table(checks)}")
    raise typer.Exit(0 if is_healthy else 1)


@app.command(rich_help_panel=CHECK)
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown tables, as in docs/config.md.")
    ] = False,
) -> None:
    """Print the JSON Schema of the config, with a description of every key."""
    from rlhf_ray.config import reference

    if markdown:
        typer.echo(reference.markdown().rstrip())
    else:
        print_json(Config.model_json_schema())
