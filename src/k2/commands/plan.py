"""`k2 plan`: what pretraining a preset takes on a cluster."""

from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2.commands.options import echo, json_output, load
from k2.errors import UserError

if TYPE_CHECKING:
    from k2.config.cluster import Cluster


@click.command()
@click.argument("preset")
@click.option("--cluster", "place", required=True, help="A cluster file, or the name of one that comes with k2.")
@click.option("--layout", "wanted", help="name=value,...: this layout instead of the fastest one that fits.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="A field of the preset; repeatable.")
@click.option("--cluster-set", "constants", multiple=True, metavar="PATH=VALUE", help="A constant; repeatable.")
@click.option("--top", type=click.IntRange(1, 50), default=5, show_default=True, help="How many layouts to list.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write the plan as a page.")
@click.option("--values", type=click.Path(path_type=Path), help="Write the Helm values of the cluster's node pool.")
@click.option("--dry-run", "rank", type=click.IntRange(0), help="Also build this rank's part and count its exchanges.")
@json_output
def plan(
    preset: str,
    place: str,
    wanted: str | None,
    overrides: tuple[str, ...],
    constants: tuple[str, ...],
    top: int,
    page: Path | None,
    values: Path | None,
    rank: int | None,
    as_json: bool,
) -> None:
    """What pretraining PRESET takes on a cluster: memory, time, GPU-hours, money.

    \b
    k2 plan k2-1t --cluster h800-2048
    k2 plan k2-1t --cluster h800-256 --layout pp=16,ep=16,offload_optimizer=true
    k2 plan k2-1t --cluster h800-2048 --dry-run 0
    k2 plan k2-1t --cluster my.yaml --cluster-set gpu.efficiency=0.4 --html plan.html --values pool.yaml
    """
    from k2.planner.layout import default_layout, parse_layout
    from k2.planner.plan import make_plan, search, what_if
    from k2.planner.report import comparison, helm_values, plan_page, plan_text

    config = load(preset, None, overrides)[0].pretrain
    cluster = load_cluster(place, constants)
    if wanted:
        plans = [make_plan(config, replace(default_layout(config), **parse_layout(wanted)), cluster)]
    else:
        plans = search(config, cluster, top)
    best = plans[0]
    if page:
        page.write_text(plan_page(best, cluster, what_if(config, best.layout, cluster)), encoding="utf-8")
    if values:
        values.write_text(helm_values(cluster), encoding="utf-8")
    listed = ["", "GB, s a step, MFU, days, cost of the fastest layouts"]
    listed += ["  " + " | ".join(row) for row in comparison(plans)]
    text = plan_text(best, cluster) + ("\n".join(["", *listed]) if len(plans) > 1 else "")
    document: dict[str, Any] = {"cluster": cluster.name, "plans": [each.as_dict() for each in plans]}
    if rank is not None:
        from k2.distributed.dry_run import dry_run

        found = dry_run(config, best.layout, rank)
        document, text = document | {"dry_run": asdict(found)}, f"{text}\n\n{found.text()}"
    echo(document, as_json, text)


def load_cluster(place: str, constants: tuple[str, ...]) -> "Cluster":
    """A cluster from a file or by name, with constants replaced.

    Raises:
        UserError: there is none, or naming every bad or missing constant.
    """
    from k2.config.cluster import Cluster
    from k2.config.load import merge_overrides, parse_document, read_document
    from k2.platform.documents import validated

    shipped = {item.name.removesuffix(".yaml"): item for item in files("k2.planner").joinpath("clusters").iterdir()}
    if place in shipped:
        document = parse_document(shipped[place].read_text(encoding="utf-8"), place)
    elif Path(place).exists():
        document = read_document(Path(place))
    else:
        raise UserError(f"--cluster {place!r}: no such file; clusters that come with k2: {', '.join(sorted(shipped))}")
    changed = merge_overrides(document, constants)
    overridden = {constant.partition("=")[0]: "given on the command line" for constant in constants}
    return validated(changed | {"sources": changed.get("sources", {}) | overridden}, Cluster, place)


COMMANDS = (plan,)
