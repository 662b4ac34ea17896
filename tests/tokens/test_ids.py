import pytest
import torch

from hooklens.errors import InputError
from hooklens.tokens import check_token_ids


class TestCheckTokenIds:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_good_ids_pass(self, dtype):
        assert check_token_ids(torch.tensor([[0, 9], [3, 4]], dtype=dtype), 10) is None
        assert check_token_ids(torch.tensor([9], dtype=dtype), 10) is None

    def test_all_offenders_are_named(self):
        with pytest.raises(
            InputError,
            match=r"outside the vocabulary: 10 \(row 0, position 1\), -1 \(row 1, position 0\); "
            r"this model has d_vocab=10, ids 0 to 9",
        ):
            check_token_ids(torch.tensor([[0, 10], [-1, 9]]), 10)
        with pytest.raises(InputError, match=r"12 \(row 0, position 2\);"):
            check_token_ids(torch.tensor([1, 2, 12]), 10)
        with pytest.raises(InputError, match=r"\(row 0, position 9\) and 90 more;"):
            check_token_ids(torch.full((1, 100), 11), 10)

    def test_form_alone_is_checked_where_there_are_no_values(self):
        assert check_token_ids(torch.ones(1, 2, dtype=torch.long, device="meta"), 1) is None
        with pytest.raises(InputError, match=r"dtype torch\.float32"):
            check_token_ids(torch.ones(1, 2, device="meta"), 1)

    @pytest.mark.parametrize("outside", [-1, 10])
    def test_the_first_id_outside_is_an_offender(self, outside):
        with pytest.raises(InputError, match=rf"outside the vocabulary: {outside} \(row 0, position 0\); "):
            check_token_ids(torch.tensor([outside]), 10)

    @pytest.mark.parametrize(
        ("tokens", "text"),
        [
            (torch.ones(1, 2), "dtype torch.float32; expected an integer dtype"),
            (torch.ones(1, 2, dtype=torch.bool), "dtype torch.bool; expected an integer dtype"),
            (torch.ones(1, 2, 3, dtype=torch.long), r"shape \[1, 2, 3\]; expected \[pos\] or \[batch pos\]"),
            (torch.tensor(3), r"shape \[\]; expected \[pos\]"),
            (torch.ones(2, 0, dtype=torch.long), r"empty \(shape \[2, 0\], an empty prompt\)"),
        ],
    )
    def test_what_is_no_ids(self, tokens, text):
        with pytest.raises(InputError, match=text):
            check_token_ids(tokens, 10)
