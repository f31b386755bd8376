def mean(
    mean: int,
    values: tuple[int, ...],
    weights: tuple[float, ...],
    whole: float,
    first: int,
    stop: int,
    /,
) -> None: ...
def add(
    sums: int,
    values: tuple[int, ...],
    weights: tuple[float, ...],
    count: int,
    is_first: bool,
    /,
) -> None: ...
