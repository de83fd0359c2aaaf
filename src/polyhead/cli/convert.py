"""`polyhead convert`: a checkpoint in another layout."""

from __future__ import annotations

from pathlib import Path

import click

from polyhead.cli.options import progress_bar
from polyhead.cli.parameters import NewFile, OneOf, ReadablePath
from polyhead.convert import convert_file
from polyhead.convert.state_dict import LAYOUTS

__all__ = ["convert_command"]


@click.command("convert")
@click.argument("path", metavar="IN", type=ReadablePath(folders=True))
@click.argument("output", metavar="OUT", type=NewFile())
@click.option("--from", "source", type=OneOf(LAYOUTS), help="IN's layout, if not in config.json.")
@click.option("--to", "target", type=OneOf(LAYOUTS), required=True, help="OUT's layout.")
@click.option(
    "--heads", "num_heads", type=click.IntRange(min=1), help="Query heads, if not in config.json."
)
@click.option("--kv-heads", "num_kv_heads", type=click.IntRange(min=1), help="Key/value heads.")
@click.option("--nope-head-dim", type=click.IntRange(min=1), help="DeepSeek's qk_nope_head_dim.")
@click.option("--value-head-dim", type=click.IntRange(min=1), help="DeepSeek's v_head_dim.")
@click.option("--force", "overwrite", is_flag=True, help="Replace OUT if it exists.")
def convert_command(
    path: Path,
    output: Path,
    source: str | None,
    target: str,
    num_heads: int | None,
    num_kv_heads: int | None,
    nope_head_dim: int | None,
    value_head_dim: int | None,
    overwrite: bool,
) -> None:
    """Write the checkpoint IN as OUT, its attention weights in another layout.

    IN is a .safetensors file, a .pt, .bin or .ckpt file of tensors by name, or a folder with one or
    with shards and their index. OUT is a .safetensors or .pt file. A config.json next to IN
    completes the options. Nothing is written unless every attention layer is converted.
    """
    with progress_bar() as show:
        report = convert_file(
            path,
            output,
            source=source,
            target=target,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            nope_head_dim=nope_head_dim,
            value_head_dim=value_head_dim,
            overwrite=overwrite,
            progress=show,
        )
    click.echo(
        f"{output}: {report.layers} attention layers converted from {report.source} to {target}, "
        f"{report.unchanged} other tensors copied, {report.bytes / 1e6:.1f} MB"
    )
    if report.dropped:
        shown = ", ".join(report.dropped[:3]) + (", ..." if len(report.dropped) > 3 else "")
        click.echo(f"{len(report.dropped)} old buffers left out ({shown})")
