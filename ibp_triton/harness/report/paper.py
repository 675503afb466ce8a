"""The numbers of arXiv 1502.04434v3, Table 1 and Figure 4, to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

from ibp_triton.harness.config import PublishedTable


@dataclass(frozen=True)
class Published:
    """Error in per cent, mean and sd over ten subsets of 10 000; best β or ε as printed; seconds an epoch."""

    mean: float
    sd: float
    parameter: float | None
    seconds: float


TABLES: dict[PublishedTable, dict[str, Published]] = {
    "table1_mnist": {
        "bp": Published(1.21, 0.08, None, 1.51),
        "prediction_ibp": Published(0.90, 0.10, 1.0, 2.64),
        "loss_ibp": Published(1.09, 0.11, 0.03, 2.25),
        "at": Published(0.89, 0.05, 0.05, 2.66),
        "fast_at": Published(0.89, 0.06, 0.03, 2.28),
        "tbp": Published(1.07, 0.12, 0.01, 7.47),
        "fast_tbp": Published(1.21, 0.08, 0.0003, 5.38),
    },
    "table1_cifar10": {
        "bp": Published(34.7, 0.6, None, 2.84),
        "prediction_ibp": Published(32.6, 0.4, 0.1, 5.20),
        "loss_ibp": Published(33.1, 0.5, 0.003, 4.24),
        "at": Published(34.7, 0.3, 0.0003, 5.40),
        "fast_at": Published(34.7, 0.6, 0.0003, 4.78),
        "tbp": Published(27.2, 0.7, 0.1, 15.55),
        "fast_tbp": Published(34.7, 0.3, 0.0003, 10.30),
    },
}

IMPROVEMENTS = {1_000: 43.0, 60_000: 18.0}  # Figure 4: per cent of BP's error, by the number of digits, not augmented
BETAS = {  # the toolbox's strengths for Figure 4, from 1 000 digits on, by whether they are augmented
    False: ".2 .15 .1 .05 .03 .02 .02 .02",
    True: ".01 .005 .003 .003 .002 …",
}
