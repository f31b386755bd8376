"""The fifty cases of fault injection: where those are shown that have no test in this folder.

A case has a test of its name here (``test_case_07_…``), stands in ``ELSEWHERE`` with a test that
shows exactly it, or in ``NOT_HERE`` with the reason why it cannot happen or be tested.
"""

ELSEWHERE = {
    15: "tests/faults/test_parent_death.py::test_case_14_parent_killed_whatever_its_workers_do",
    21: "tests/cluster/test_cycles.py::test_two_hundred_cycles_leave_nothing",
    24: "tests/faults/test_parent_death.py::test_case_18_the_parent_ends_without_close",
    33: "tests/contract/test_launch.py::test_a_notebook",
    37: "tests/memory/test_arena.py::test_a_borrow_leaves_owner_and_later_borrows_alone",
    38: "tests/contract/test_borrow.py::test_waiting_for_a_held_command_raises_at_once",
    39: "tests/contract/test_pointers.py::test_a_pointer_cannot_be_saved",
    41: "tests/memory/test_arena.py::test_mixed_sizes_never_run_out_early",
    45: "tests/contract/test_errors.py::test_the_end_of_with_raises_unseen_errors",
    50: "tests/worker/test_imports.py::test_sync_raises_where_the_call_was_made",
}
NOT_HERE = {
    49: "a budget of time: tests assert none. The default of one thread per share of the cores is "
    "tests/contract/test_surroundings.py::test_threads_default_to_a_share_of_the_cores; "
    "benchmarks/overlap.py measures it.",
}
PARTS_NOT_HERE = {
    7: "a real kill by the kernel would need a control group that may be written, or a machine "
    "without other users: the kernel's counter is injected.",
    19: "a preload that initialises CUDA: needs a GPU.",
    45: "a warning at interpreter exit: an error nobody waited for, in a cluster nobody closed, is "
    "not told; `with` and `wait` tell it.",
    46: "cancel: there is none. A wait ends by its timeout, the work by the end of its worker.",
    47: "a deadline of a move: it has none; a round has one, and ends the worker.",
}
