"""Published values of every loss: loss, and its derivatives by the policy's two log-probs, at two places.

The reference gives the chosen completion -40 nats over 20 tokens and the rejected one -50 over 30. The policy equals
it first (r = 0), and then stands at log-ratios of -2 and -6. The numbers are given to five decimals or six digits.
"""

from dataclasses import replace

import pytest
import torch

import lit_dpo
from tests.losses.values import at, gradient

TABLE = """
DPOLoss()                            0.69315 -0.05000  0.05000 | 0.51302 -0.04013  0.04013
DPOLoss(5.0, length_normalize=True)  0.69315 -0.12500  0.08333 | 0.47408 -0.09439  0.06292
HingeLoss()                          1.00000 -0.10000  0.10000 | 0.60000 -0.10000  0.10000
RobustDPOLoss()                      0.69315 -0.06250  0.06250 | 0.46302 -0.05263  0.05263
EXOLoss()                            2.76123 -0.17267  0.17267 | 2.09923 -0.15633  0.15633
NCAPairLoss(beta=0.1)                1.38629 -0.02500  0.02500 | 1.31595 -0.03248  0.01772
BCOPairLoss()                        1.38629 -0.05000  0.05000 | 1.23563 -0.05498  0.03543
SPPOLoss(beta=0.1)                   50.0000 -10.0000  10.0000 | 50.0000 -14.0000 -2.00000
APOZeroLoss()                        1.00000 -0.02500  0.02500 | 0.90418 -0.02475  0.02288
APODownLoss()                        1.00000  0.00000  0.02500 | 0.85148  0.00073  0.02403
FDPOLoss()                           0.69315 -0.02500  0.02500 | 0.51803 -0.03561  0.04033
SimPOLoss()                          2.20068 -0.11116  0.07411 | 1.98165 -0.10777  0.07185
CPOLoss()                            2.31326 -0.07689  0.02689 | 2.32042 -0.06978  0.01978
ORPOLoss()                           2.09114 -0.05346  0.00246 | 2.18376 -0.05323  0.00224
RDPOLoss()                           0.74440 -0.05250  0.05250 | 0.55436 -0.04256  0.04256
MinorDPOLoss()                       0.69315 -0.05000  0.00000 | 0.79814 -0.05498  0.00000
DPOShiftLoss()                       0.69315 -0.05000  0.04750 | 0.52516 -0.04085  0.03881
ODPOLoss(scaling="linear")           0.97408 -0.06225  0.06225 | 0.74440 -0.05250  0.05250
"""
ROWS = [line.rsplit(maxsplit=7) for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_loss_and_gradient_are_the_published_ones(row):
    name, *numbers = row
    loss = eval(name, {each: getattr(lit_dpo, each) for each in lit_dpo.__all__})
    numbers.remove("|")
    for ratios, printed in zip(((0.0, 0.0), (-2.0, -6.0)), (numbers[:3], numbers[3:]), strict=True):
        policy, reference = at(*ratios)
        offset = {"score_chosen": torch.tensor([0.5]), "score_rejected": torch.tensor([0.0])}
        policy = replace(policy, columns=offset)
        found = [loss(policy, reference).item(), *gradient(loss, policy, reference)]
        assert found == [pytest.approx(float(text), abs=0.50001 * 10.0 ** -len(text.split(".")[1])) for text in printed]


def test_no_loss_of_a_pair_is_missing():
    """Those over single tokens have no value at a sum alone, and those of 0.1 have values in their own tests."""
    elsewhere = {"ADPOLoss", "LDDPOLoss", "DPOPLoss", "IPOLoss", "SFTLoss", "IntermediateLoss", "WeightedLoss"}
    losses = {name for name in lit_dpo.__all__ if name.endswith("Loss")} - {"PreferenceLoss"}
    assert {row[0].partition("(")[0] for row in ROWS} == losses - elsewhere
