def mean(
    mean: int,
    values: tuple[int, ...],
    weights: tuple[float, ...],
    whole: float,
    first: int,
    stop: int,
    /,
) -> None: ...
def add(sums: int, values: int, weight: float, count: int, is_first: bool, /) -> None: ...
