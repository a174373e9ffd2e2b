"""k-means, seeded, and blind to the order of its points: Lloyd's iterations from k-means++ starts, the best kept."""

import torch
from torch import Tensor

_ITERATIONS = 300


def k_means(points: Tensor, num_clusters: int, generator: torch.Generator, starts: int) -> Tensor:
    """The cluster (N,) of each of points (N, F), on the CPU's random numbers; no cluster is empty.

    num_clusters is at most N. Points are taken by falling norm, so that permuted points are clustered alike.
    """
    order_N = points.norm(dim=1).argsort(descending=True, stable=True)
    sorted_NF = points[order_N]
    runs = [_lloyd(sorted_NF, _plus_plus(sorted_NF, num_clusters, generator)) for _ in range(starts)]
    _, cluster_N = min(runs, key=lambda run: run[0])
    return cluster_N[order_N.argsort()]


def _plus_plus(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Different points as first centroids, far ones the more likely (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < num_clusters:
        squared_N = _squared_distances(points, points[chosen]).amin(1).cpu()
        squared_N[chosen] = 0
        if not squared_N.any():  # the rest are copies of chosen ones: any of them
            squared_N = torch.ones(len(points), dtype=points.dtype)
            squared_N[chosen] = 0
        chosen.append(int(torch.multinomial(squared_N, 1, generator=generator)))
    return points[chosen]


def _lloyd(points: Tensor, centroids: Tensor) -> tuple[float, Tensor]:
    """The summed squared distance, and the cluster of each point."""
    num_clusters = len(centroids)
    cluster_N = torch.full((len(points),), -1, device=points.device)
    for _ in range(_ITERATIONS):
        squared_NK = _squared_distances(points, centroids)
        nearest_N = _filled(squared_NK)
        if torch.equal(nearest_N, cluster_N):
            break
        cluster_N = nearest_N
        centroids = torch.stack([points[cluster_N == cluster].mean(0) for cluster in range(num_clusters)])
    return float((points - centroids[cluster_N]).square().sum()), cluster_N


def _filled(squared: Tensor) -> Tensor:
    """The nearest centroid of each point (N, K) -> (N,); an empty cluster takes the farthest point of a shared one."""
    nearest_N = squared.argmin(1)
    own_N = squared.amin(1).clone()
    for cluster in range(squared.shape[1]):
        counts_K = nearest_N.bincount(minlength=squared.shape[1])
        if counts_K[cluster] == 0:
            farthest = own_N.where(counts_K[nearest_N] > 1, -1).argmax()
            nearest_N[farthest], own_N[farthest] = cluster, 0
    return nearest_N


def _squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
