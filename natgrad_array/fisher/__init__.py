"""The Fisher information of networks: exact, and estimates beside it with the same interface."""

from natgrad_array.fisher.compare import FisherComparison
from natgrad_array.fisher.estimates import FisherEstimate, empirical_fisher, sampled_fisher
from natgrad_array.fisher.network import NetworkFisher

__all__ = ["FisherComparison", "FisherEstimate", "NetworkFisher", "empirical_fisher", "sampled_fisher"]
