"""How an epsilon is printed: rounded up, never down."""
import math
from decimal import ROUND_CEILING, Context, Decimal


def round_up(x, digits=4):
    """x as text of so many digits, rounded up from the decimal form Python prints: 9.99999999 -> "10"."""
    x = float(x)
    if not math.isfinite(x):
        return str(x)
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).plus(Decimal(repr(x)))):.{digits}g}"
