"""A speed table for people. May import: planner.evaluate.speed, planner.report.tables."""

from bitplan.planner.evaluate.speed import Speed, shape_of
from bitplan.planner.report.tables import table


def speed_text(speed: Speed) -> str:
    """What `bitplan speed` prints: a column for each shape, a row for each format, in microseconds."""
    shapes = list(dict.fromkeys(shape_of(row) for row in speed.rows))
    seconds = {(shape_of(row), row.format): row.seconds for row in speed.rows}
    heads = [
        f"{kind} {f'{experts}×' if experts > 1 else ''}{rows}×{columns}" for kind, experts, rows, columns, _ in shapes
    ]
    formats = dict.fromkeys(row.format for row in speed.rows)
    cells = [
        (name, *(f"{1e6 * seconds[shape, name]:,.1f}" if (shape, name) in seconds else "" for shape in shapes))
        for name in formats
    ]
    return (
        f"{speed.model} on {speed.device}\n\n{table(('µs for one token', *heads), cells)}\n\n"
        f"full precision decodes a token in {1e3 * speed.step:.3f} ms, with {speed.prompt} tokens in the cache"
    )
