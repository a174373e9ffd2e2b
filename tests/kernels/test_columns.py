"""Columns: which rows and columns belong to which expert."""

import torch

from molex.kernels import Columns, columns_of


def test_columns_of_unequal_ranks() -> None:
    assert columns_of((2, 1, 3)).tolist() == [0, 0, 1, 2, 2, 2]


def test_an_expert_owns_its_neighbouring_columns() -> None:
    A, B = torch.arange(6.0)[:, None], torch.arange(6.0)[None]
    A_RD, B_OR = Columns(A, B, (2, 1, 3), columns_of((2, 1, 3))).expert(2)
    assert A_RD.flatten().tolist() == B_OR.flatten().tolist() == [3, 4, 5]


def test_shared_rows_are_computed_once_and_read_by_each_expert() -> None:
    columns = Columns(torch.randn(2, 5), torch.randn(4, 6), (2, 2, 2), columns_of((2, 2, 2)), torch.arange(6) % 2)
    x = torch.randn(3, 5)
    assert torch.equal(columns.shrink(x), (x @ columns.A.T).repeat(1, 3))
    assert torch.equal(columns.expert(1)[0], columns.A)
    assert torch.equal(columns.expert(1)[1], columns.B[:, 2:4])


def test_uniform_rank() -> None:
    A, B = torch.zeros(4, 1), torch.zeros(1, 4)
    assert Columns(A, B, (2, 2), columns_of((2, 2))).uniform_rank() == 2
    assert Columns(A, B, (1, 3), columns_of((1, 3))).uniform_rank() is None
