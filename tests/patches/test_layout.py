"""Who holds which rows, and what travels: checked by really cutting, sending and convolving, without any ranks."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncdiff_fast.mesh import AXES, Mesh
from asyncdiff_fast.patches import layout, site_rows
from asyncdiff_fast.patches.kinds import make_state
from asyncdiff_fast.patches.layout import Rows, Tokens
from asyncdiff_fast.patches.site import Halo, Norm, Resize, Ring
from asyncdiff_fast.patches.sites import ATTENTION, CONV, NORM, RESIZE, Seen

quick = settings(max_examples=80, deadline=None)
rows_counts = st.integers(1, 70)
patch_counts = st.integers(1, 9)
factors = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def assert_owned_once(rows):
    assert len(rows.held) == len(rows.owned)
    owners = [p for p, (start, stop) in enumerate(rows.owned) for _ in range(start, stop)]
    assert len(owners) == rows.size and owners == sorted(owners)
    for (start, stop), (held_start, held_stop) in zip(rows.owned, rows.held, strict=True):
        assert held_start <= start <= stop <= held_stop <= rows.size


# Rows of the latent.


@quick
@given(rows_counts, patch_counts, factors, st.booleans())
def test_split(size, num_patches, factor, aligned):
    if -(-size // (factor if aligned else 1)) < num_patches:
        with pytest.raises(ValueError, match=f"num_patches={num_patches}, {size} rows"):
            layout.split(size, num_patches, factor, aligned)
        return
    rows = layout.split(size, num_patches, factor, aligned)
    assert rows.size == size and len(rows.held) == num_patches and rows.aligned
    assert_owned_once(rows)
    assert all(start < stop for start, stop in rows.held)
    if aligned:
        assert all(start % factor == 0 for start, _ in rows.held)
    longest = max(stop - start for start, stop in rows.held)
    finest = -(-size // num_patches)
    assert longest <= max(layout.UNEVEN * size / num_patches, finest, factor * -(-size // (num_patches * factor)))


def test_split_prefers_whole_coarse_rows_but_not_at_any_price():
    assert layout.split(128, 4, 4).held == ((0, 32), (32, 64), (64, 96), (96, 128))
    assert layout.split(128, 3, 4).held == ((0, 40), (40, 84), (84, 128))
    # Two patches of whole coarse rows would be 8 and 4 rows.
    assert layout.split(12, 2, 8).held == ((0, 6), (6, 12))


@quick
@given(rows_counts, patch_counts, st.lists(st.sampled_from([2, 3, 4]), max_size=3))
def test_every_row_of_every_resolution_has_one_owner(size, num_patches, steps):
    assume(size >= num_patches)
    rows, sizes = layout.split(size, num_patches), [size]
    for step in steps:
        rows = rows.coarser(-(-rows.size // step), step)
        sizes.append(rows.size)
        assert_owned_once(rows)
    for step, finer in zip(reversed(steps), reversed(sizes[:-1]), strict=True):
        rows = rows.finer(finer, step)
        assert_owned_once(rows)


# Convolutions and interpolations.


def _seen(kind, shape, result, options):
    return Seen(kind, shape, result, options, torch.float32)


@st.composite
def networks(draw):
    """[(kind, rows before, after, options)] of a network that goes down and comes back up, as UNets do."""
    size, found, sizes = draw(st.integers(1, 48)), [], []
    for step in draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), max_size=4)):
        # Nearest neighbours of other sizes are not whole rows; see below.
        if step > 2 and size % step:
            continue
        kernel = draw(st.integers(1, 7))
        dilation = draw(st.integers(1, 3)) if kernel > 1 else 1
        if step > 1:
            dilation = 1
        reach = dilation * (kernel - 1)
        low = max(0, -(-(reach - step + 1) // 2)) if step > 1 else reach // 2
        if step == 1 and reach % 2:
            continue
        after = (size + 2 * low - reach - 1) // step + 1
        # Levels are told by the ratio of their sizes, so only what divides as a level does is one.
        if after < 1 or -(-size // after) != step or after != -(-size // step) or after in sizes:
            continue
        found.append((CONV, size, after, (kernel, step, low, dilation)))
        if step > 1:
            sizes.append(size)
        size = after
    for above in reversed(sizes):
        found.append((RESIZE, size, above, ("nearest",)))
        found.append((CONV, above, above, (3, 1, 1, 1)))
        size = above
    return found


def _recorder(network):
    key, seen = ("net", 0), []
    for kind, before, after, options in network:
        options = (options, (1, 1, 0, 1)) if kind == CONV else options
        seen.append(_seen(kind, (1, 1, before, 2), (1, 1, after, 2), options))
    order = [(key, place) for place in range(len(seen))]
    return SimpleNamespace(order=order, sites={key: seen}, calls=[], outside=())


def _sites(network, num_patches):
    rows = layout.split(network[0][1], num_patches)
    recorder = _recorder(network)
    levels = site_rows.levels_of(recorder, rows)
    return site_rows.resampling_sites(recorder, levels)


class Step:
    """What a state asks of a synchronous step, without ranks: everything has been put in place before."""

    def exchange(self, state):
        pass


def _around(site, whole, patch):
    """A patch's window of rows: its own, those of the messages to it, zeros."""
    need = site.windows[patch]
    found = {}
    start, stop = site.before.held[patch]
    for row in range(start, stop):
        found[row] = whole[..., row : row + 1, :]
    for m in site.messages:
        if m.target == patch:
            for row in range(m.start, m.stop):
                assert row not in found, "a row is sent to a patch that has it"
                found[row] = whole[..., row : row + 1, :]
    pieces = [found[row] for row in range(*need.needs)]
    zeros = [whole.new_zeros(*whole.shape[:-2], n, whole.shape[-1]) for n in need.zeros]
    return torch.cat([zeros[0], *pieces, zeros[1]], -2)


@quick
@given(networks(), patch_counts)
def test_patches_with_their_halos_make_the_whole_convolution(network, num_patches):
    assume(network and network[0][1] >= num_patches)
    for site, (kind, before, after, options) in zip(_sites(network, num_patches), network, strict=True):
        x = torch.randn(1, 1, before, 2, dtype=torch.float64)
        if kind == RESIZE:
            assert isinstance(site, Resize)
            whole = F.interpolate(x, size=(after, 2), mode="nearest")
        else:
            assert isinstance(site, Halo)
            kernel, stride, padding, dilation = options
            weight = torch.randn(1, 1, kernel, 1, dtype=torch.float64)
            whole = F.conv2d(x, weight, None, (stride, 1), (padding, 0), (dilation, 1))
        assert whole.shape[-2] == after
        assert_owned_once(site.after)
        for patch, (start, stop) in enumerate(site.after.held):
            if start == stop:
                continue
            if kind == RESIZE:
                held = x[..., slice(*site.before.held[patch]), :]
                site = Resize(*_fields(site)[:-1], ((), (2,)))
                mine = make_state(site, patch, "cpu").run(F.interpolate, (held, (stop - start, 2)), {}, Step())
            else:
                mine = F.conv2d(_around(site, x, patch), weight, None, (stride, 1), 0, (dilation, 1))
            torch.testing.assert_close(mine, whole[..., start:stop, :])


def test_interpolations_that_no_band_can_make_are_refused():
    network = [(CONV, 25, 7, (4, 4, 1, 1)), (RESIZE, 7, 25, ("nearest",))]
    with pytest.raises(
        ValueError, match="net interpolates 7 rows to 25, and a patch that holds rows 0 to 3 needs rows 0 to 4"
    ):
        _sites(network, 2)


def _fields(site):
    return [getattr(site, name) for name in site.__dataclass_fields__]


@quick
@given(networks(), patch_counts)
def test_senders_own_what_they_send(network, num_patches):
    assume(network and network[0][1] >= num_patches)
    for site in _sites(network, num_patches):
        for m in getattr(site, "messages", ()):
            start, stop = site.before.owned[m.source]
            assert m.source != m.target and start <= m.start < m.stop <= stop


# Sends and receives.


def assert_paired(site, num_patches):
    """Patch a's sends to b are b's receives from a: as many, in the same order, of the same sizes."""
    states = [make_state(site, p, "cpu") for p in range(num_patches)]
    for a, b in itertools.permutations(range(num_patches), 2):
        sends = [tuple(x.shape) for target, x in states[a].sends() if target == b]
        recvs = [tuple(x.shape) for source, x in states[b].recvs() if source == a]
        assert sends == recvs
        assert sends == list(site.sent(a).get(b, []))


@quick
@given(networks(), patch_counts)
def test_halos_are_sent_and_received_alike(network, num_patches):
    assume(network and network[0][1] >= num_patches)
    for site in _sites(network, num_patches):
        if isinstance(site, Halo):
            shapes = tuple((1, 3, stop - start, 2) for start, stop in site.before.held)
            site = Halo("conv", 0, 0, CONV, shapes, torch.float32, *_fields(site)[6:])
            assert_paired(site, num_patches)
            assert site.sent_bytes(0) == sum(24 * (m.stop - m.start) for m in site.messages if m.source == 0)


@quick
@given(rows_counts, patch_counts, st.integers(1, 3), st.integers(0, 3), st.sampled_from([1, 2]))
def test_statistics_keys_and_values_go_to_all(size, num_patches, inner, extra, step):
    assume(size >= num_patches)
    rows = layout.split(size, num_patches).coarser(-(-size // step), step)
    held = [stop - start for start, stop in rows.held]
    norm = Norm("n", 0, 0, NORM, tuple((2, 8, h, 4) for h in held), torch.float16, 4, rows)
    assert_paired(norm, num_patches)
    assert sum(norm.weights) == pytest.approx(1)
    assert norm.sent_bytes(0) == (num_patches - 1) * 2 * 4 * 2 * 4
    tokens = Tokens(rows, inner, extra)
    shapes = tuple((2, 3, h * inner + extra, 5) for h in held)
    ring = Ring("a", 0, 0, ATTENTION, shapes, torch.float16, tokens, (2, 3, 5), (2, 3, 6))
    assert_paired(ring, num_patches)
    for patch in range(num_patches):
        assert ring.sent_bytes(patch) == (num_patches - 1) * tokens.count(patch) * 2 * 3 * 11 * 2


# Tokens.


@quick
@given(rows_counts, patch_counts, st.integers(1, 4), st.integers(0, 5), st.integers(1, 3), st.sampled_from([1, 2]))
def test_every_token_has_one_owner(size, num_patches, width, extra, outer, step):
    assume(size >= num_patches)
    rows = layout.split(size, num_patches).coarser(-(-size // step), step)
    # Rows are held twice in pictures only.
    assume(outer == 1 or rows.aligned)
    tokens = Tokens(rows, width * outer, extra, outer)
    places = []
    for patch in range(num_patches):
        start, stop = tokens.own(patch)
        assert stop - start == tokens.count(patch)
        places += tokens.places(patch)[start:stop]
    assert sorted(places) == list(range(rows.size * width * outer))


@quick
@given(rows_counts, patch_counts, st.integers(1, 4), st.integers(0, 5), st.sampled_from([1, 2]))
def test_tokens_of_a_row_are_told_by_lengths(size, num_patches, inner, extra, step):
    assume(size >= num_patches > 1)
    rows = layout.split(size, num_patches).coarser(-(-size // step), step)
    held = [stop - start for start, stop in rows.held]
    # Each patch holds the whole where patches are finer than its rows: then nothing tells rows from others.
    assume(any(h != rows.size for h in held))
    lengths = [extra + inner * h for h in held]
    if sum(held) != num_patches * rows.size:
        assert layout.tokens_of(rows, extra + inner * rows.size, lengths) == (inner, extra)
    whole, changed = extra + inner * rows.size, [lengths[0] + 1, *lengths[1:]]
    # Other numbers may fit what has changed.
    readings = [(i, whole - i * rows.size) for i in range(whole // rows.size + 1)]
    fitting = [(i, e) for i, e in readings if changed == [e + i * h for h in held]]
    if fitting:
        assert layout.tokens_of(rows, whole, changed) in fitting
    else:
        with pytest.raises(ValueError, match="on patches of"):
            layout.tokens_of(rows, whole, changed)


# Ranks.


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(1, 3))
def test_mesh(steps, halves, patches, stages):
    mesh = Mesh(steps, halves, patches, stages)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert places == list(itertools.product(range(steps), range(halves), range(patches), range(stages)))
    for axis, number in zip(AXES, (steps, halves, patches, stages), strict=True):
        groups = {mesh.along(axis, rank) for rank in range(mesh.size)}
        assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
        for group in groups:
            assert [places[r][AXES.index(axis)] for r in group] == list(range(number))


def test_rows_shared_by_two_patches_belong_to_the_first():
    rows = Rows(12, ((0, 6), (6, 12))).coarser(3, 4)
    assert rows.held == ((0, 2), (1, 3)) and rows.owned == ((0, 2), (2, 3)) and not rows.aligned
    assert rows.finer(12, 4).held == ((0, 8), (8, 12))
