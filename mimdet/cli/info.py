"""``mimdet info``."""

from __future__ import annotations


def info() -> None:
    """Show versions, devices, and which implementations are usable here."""
    from rich.console import Console
    from rich.table import Table

    from ..info import KERNELS, devices, implementations, kernel_limits, kernels, versions

    console = Console()
    operations, reasons = kernels()
    by_device = {
        place: [(op, *states) for op, device, *states in operations if device == place]
        for place in dict.fromkeys(device for _, device, *_ in operations)
    }
    sections = (
        ("Versions", ("package", "version"), versions()),
        ("Devices", ("device", "what"), devices()),
        ("Implementations", ("part", "used", "why"), implementations()),
        *((f"Operations on {place}", ("operation", *KERNELS), rows) for place, rows in by_device.items()),
        ("Limits of shapes", ("operation", "implementations", "take"), kernel_limits()),
    )
    for title, columns, rows in sections:
        table = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"({number}) {reason}", markup=False, highlight=False)
