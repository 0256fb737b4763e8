"""The routed convolution as implicit matrix products, in Triton.

Shapes: B images, N experts, K filters per expert, M filters in the bank, C input channels. A tile holds up to P images of one
expert and Q pixels of each: P * Q rows of a matrix product whose columns are channels. Each tile has P slots; a slot holds the
index of an image, or -1 if it is empty. `rows[e, k]` is the bank's filter that writes channel k of expert e. Sums are float32,
or float64 for float64 inputs.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def plan(experts, owners, bounds, slots, batch, N: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Assign the images to tiles, expert by expert, in order. It is one program, so that the host needs no counts.

    It writes owners [T], the expert of each tile; bounds [N + 1], the first tile of each expert; and slots [T, P]. `owners`
    and `slots` must be filled with -1 before.
    """
    image = tl.arange(0, BLOCK)
    expert = tl.load(experts + image, mask=image < batch, other=N).to(tl.int32)
    first = 0
    for e in range(N):
        tl.store(bounds + e, first)
        chosen = expert == e
        rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(slots + first * P + rank, image, mask=chosen)
        tl.store(owners + first + rank // P, tl.zeros_like(image) + e, mask=chosen)
        first += (tl.sum(chosen.to(tl.int32), 0) + P - 1) // P
    tl.store(bounds + N, first)


@triton.jit
def tile_rows(slots, tile, block, P: tl.constexpr, Q: tl.constexpr):
    """For each row of a tile: the index of its image, or -1, and the index of its pixel."""
    row = tl.arange(0, P * Q)
    return tl.load(slots + tile * P + row // Q), block * Q + row % Q


@triton.jit
def convolve(
    x, bank, bias, y, rows, owners, slots, C, K, H, W, OUT_H, OUT_W,
    x_b, x_c, x_h, x_w, bank_m, bank_c, bank_h, bank_w, y_b, y_k, y_h, y_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, BIAS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[b, k] = bias[e, k] + sum over c and taps of x[b, c] * bank[rows[e, k], c]; grid: tiles, blocks of pixels, blocks of k."""
    tile, k = tl.program_id(0), tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.load(owners + tile)
    if expert < 0:
        return
    image, pixel = tile_rows(slots, tile, tl.program_id(1), P, Q)
    out_h, out_w = pixel // OUT_W, pixel % OUT_W
    alive, kept = (image >= 0) & (pixel < OUT_H * OUT_W), k < K
    x += image.to(tl.int64)[:, None] * x_b
    bank += tl.load(rows + expert * K + k, mask=kept, other=0).to(tl.int64)[None, :] * bank_m
    total = tl.zeros((P * Q, BLOCK_K), dtype=SUM)
    chunks = tl.cdiv(C, BLOCK_C)
    for step in range(KERNEL * KERNEL * chunks):
        tap, c = step // chunks, (step % chunks) * BLOCK_C + tl.arange(0, BLOCK_C)
        h, w = out_h * STRIDE - PADDING + tap // KERNEL, out_w * STRIDE - PADDING + tap % KERNEL
        inside = alive & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        patch = tl.load(x + (h * x_h + w * x_w)[:, None] + (c * x_c)[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        at = bank + (c * bank_c + tap // KERNEL * bank_h + tap % KERNEL * bank_w)[:, None]
        filters = tl.load(at, mask=(c < C)[:, None] & kept[None, :], other=0.0)
        total = tl.dot(patch, filters, total, input_precision=PRECISION, out_dtype=SUM)
    if BIAS:
        total += tl.load(bias + expert * K + k, mask=kept, other=0.0).to(SUM)[None, :]
    y += image.to(tl.int64)[:, None] * y_b + (out_h * y_h + out_w * y_w)[:, None] + (k * y_k)[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=alive[:, None] & kept[None, :])


@triton.jit
def to_images(
    dy, bank, dx, rows, owners, slots, C, K, H, W, OUT_H, OUT_W,
    dy_b, dy_k, dy_h, dy_w, bank_m, bank_c, bank_h, bank_w, dx_b, dx_c, dx_h, dx_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[b, c] = sum over k and taps of dy[b, k] * bank[rows[e, k], c].

    Grid: tiles, blocks of cells of STRIDE x STRIDE pixels times the positions in a cell, blocks of c. Which taps reach a pixel
    depends only on its position in the cell, so a program runs only these taps.
    """
    tile, c = tl.program_id(0), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    expert = tl.load(owners + tile)
    if expert < 0:
        return
    position, cells = tl.program_id(1) % (STRIDE * STRIDE), tl.cdiv(W, STRIDE)
    image, cell = tile_rows(slots, tile, tl.program_id(1) // (STRIDE * STRIDE), P, Q)
    h, w = cell // cells * STRIDE + position // STRIDE, cell % cells * STRIDE + position % STRIDE
    alive, kept = (image >= 0) & (h < H) & (w < W), c < C
    first_h, first_w = (position // STRIDE + PADDING) % STRIDE, (position % STRIDE + PADDING) % STRIDE
    taps_h, taps_w = (KERNEL - first_h + STRIDE - 1) // STRIDE, (KERNEL - first_w + STRIDE - 1) // STRIDE
    dy += image.to(tl.int64)[:, None] * dy_b
    bank += (c * bank_c)[None, :]
    total = tl.zeros((P * Q, BLOCK_C), dtype=SUM)
    chunks = tl.cdiv(K, BLOCK_K)
    for step in range(taps_h * taps_w * chunks):
        tap, k = step // chunks, (step % chunks) * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_h, tap_w = first_h + tap // taps_w * STRIDE, first_w + tap % taps_w * STRIDE
        out_h, out_w = (h + PADDING - tap_h) // STRIDE, (w + PADDING - tap_w) // STRIDE  # exact
        inside = alive & (h + PADDING >= tap_h) & (out_h < OUT_H) & (w + PADDING >= tap_w) & (out_w < OUT_W)
        at = dy + (out_h * dy_h + out_w * dy_w)[:, None] + (k * dy_k)[None, :]
        gradient = tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        row = tl.load(rows + expert * K + k, mask=k < K, other=0).to(tl.int64)
        at = bank + (row * bank_m + tap_h * bank_h + tap_w * bank_w)[:, None]
        filters = tl.load(at, mask=(k < K)[:, None] & kept[None, :], other=0.0)
        total = tl.dot(gradient, filters, total, input_precision=PRECISION, out_dtype=SUM)
    dx += image.to(tl.int64)[:, None] * dx_b + (h * dx_h + w * dx_w)[:, None] + (c * dx_c)[None, :]
    tl.store(dx, total.to(dx.dtype.element_ty), mask=alive[:, None] & kept[None, :])


@triton.jit
def to_filters(
    dy, x, parts, bounds, slots, C, K, H, W, OUT_H, OUT_W,
    dy_b, dy_k, dy_h, dy_w, x_b, x_c, x_h, x_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, N: tl.constexpr, SPLITS, P: tl.constexpr, Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[split, e, k, tap, c] = sum of dy[b, k] * x[b, c] over the pixels that the split has of expert e's images.

    Grid: experts times splits, taps, blocks of k times blocks of c. parts [SPLITS, N, K, KERNEL * KERNEL, C] is contiguous. Its
    sum over the splits is the gradient. The order of the sums is fixed.
    """
    split, expert, tap, blocks = tl.program_id(0) // N, tl.program_id(0) % N, tl.program_id(1), tl.cdiv(C, BLOCK_C)
    k = tl.program_id(2) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(2) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last, chunks = tl.load(bounds + expert), tl.load(bounds + expert + 1), tl.cdiv(OUT_H * OUT_W, Q)
    total = tl.zeros((BLOCK_K, BLOCK_C), dtype=SUM)
    for step in range(split, (last - first) * chunks, SPLITS):
        image, pixel = tile_rows(slots, first + step // chunks, step % chunks, P, Q)
        out_h, out_w = pixel // OUT_W, pixel % OUT_W
        h, w = out_h * STRIDE - PADDING + tap // KERNEL, out_w * STRIDE - PADDING + tap % KERNEL
        inside = (image >= 0) & (pixel < OUT_H * OUT_W) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = dy + (image.to(tl.int64) * dy_b + out_h * dy_h + out_w * dy_w)[None, :] + (k * dy_k)[:, None]
        gradient = tl.load(at, mask=inside[None, :] & (k < K)[:, None], other=0.0)
        at = x + (image.to(tl.int64) * x_b + h * x_h + w * x_w)[:, None] + (c * x_c)[None, :]
        patch = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(gradient, patch, total, input_precision=PRECISION, out_dtype=SUM)
    row = (split * N + expert).to(tl.int64) * K + k
    tl.store(parts + (row * KERNEL * KERNEL + tap)[:, None] * C + c[None, :], total, mask=(k < K)[:, None] & (c < C)[None, :])
