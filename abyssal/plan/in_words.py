"""Figures of a plan as people read them: the only place where a byte becomes a GB. All else counts in SI units."""

from __future__ import annotations

_SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def bytes_text(n_bytes: float) -> str:
    """80_000_000_000 -> '80 GB', 1_234_000 -> '1.23 MB'."""
    return scaled(n_bytes, _SIZES, "B")


def count_text(count: float) -> str:
    """14_800_000_000_000 -> '14.8T', 2_664_000 -> '2.66M', 640 -> '640'."""
    return scaled(count, _COUNTS, "").replace(" ", "")


def flops_text(flops_per_second: float) -> str:
    """432e12 -> '432 TFLOP/s'."""
    return scaled(flops_per_second, _SIZES, "FLOP/s")


def usd_text(usd: float) -> str:
    """5_576_000 -> '$5.58M', 87_072 -> '$87.1K', 12.5 -> '$12.50', 0.0264 -> '$0.0264'."""
    if 0 < abs(usd) < 0.1:
        return f"${usd:.3g}"
    return f"${usd:.2f}" if abs(usd) < 1000 else f"${count_text(usd)}"


def seconds_text(seconds: float) -> str:
    """0.0148 -> '14.8 ms', 19.926 -> '19.9 s', 200 -> '3 min 20 s', 90_000 -> '25.0 h', 4_600_000 -> '53.2 days'."""
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 1e-3:
        return f"{_three(seconds * 1e6)} us"
    if abs(seconds) < 1:
        return f"{_three(seconds * 1e3)} ms"
    if seconds < 60:
        return f"{_three(seconds)} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{_three(seconds / 3600)} h"
    return f"{_three(seconds / 86400)} days"


def hours_text(device_hours: float) -> str:
    """2_664_000 -> '2.66M', 12.25 -> '12.2': of device-hours, without their unit."""
    return count_text(device_hours)


def percent_text(share: float) -> str:
    """0.4373 -> '43.7 %'."""
    return f"{100 * share:.1f} %"


def deviation_text(planned: float, measured: float) -> str:
    """1.1 against 1.0 -> '+10.0 %'. Nothing deviates from nothing by '–'."""
    return f"{100 * (planned / measured - 1):+.1f} %" if measured else "–"


def scaled(value: float, sizes: tuple[tuple[float, str], ...], unit: str) -> str:
    for size, letter in sizes:
        if abs(value) >= size * 0.9995:  # 999.9 MB is said as 1 GB, not as 1,000 MB
            return f"{_three(value / size)} {letter}{unit}"
    return f"{_three(value)} {unit}".rstrip()


def _three(value: float) -> str:
    """Three figures, and no fewer in front of the point."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
