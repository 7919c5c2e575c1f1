"""Numbers in, numbers out: intervals, bins of exit layers, paired tests, a sequential rule."""

from exitsafe.stats.bins import BINS, bin_of, layers_by_bin
from exitsafe.stats.bootstrap import percentile_interval, resampled_layer_means
from exitsafe.stats.differences import PairedDifference, PairedScores
from exitsafe.stats.effects import cohen_h, d_av
from exitsafe.stats.estimates import Estimate, bin_estimates, layer_estimates, mean_estimate
from exitsafe.stats.intervals import constant_interval, wilson_interval
from exitsafe.stats.paired import bootstrap_p_value, holm, mcnemar_exact
from exitsafe.stats.sequential import Decision, anytime_interval, decide, decision_bounds
from exitsafe.stats.worst import choose_worst, first_half

__all__ = [
    "BINS",
    "Decision",
    "Estimate",
    "PairedDifference",
    "PairedScores",
    "anytime_interval",
    "bin_estimates",
    "bin_of",
    "bootstrap_p_value",
    "choose_worst",
    "cohen_h",
    "constant_interval",
    "d_av",
    "decide",
    "decision_bounds",
    "first_half",
    "holm",
    "layer_estimates",
    "layers_by_bin",
    "mcnemar_exact",
    "mean_estimate",
    "percentile_interval",
    "resampled_layer_means",
    "wilson_interval",
]
