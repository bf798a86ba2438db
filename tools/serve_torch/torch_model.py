"""The transformer layers on one device: a stock Hugging Face model whose attention reads and writes
a paged KV cache, so that sessions of any length share its memory and their rows run together.

A step is four arrays, which also is all that the ranks of a tensor-parallel group exchange:

    states     [B, T, H]  float32 hidden states
    positions  [B, T]     int64
    slots      [B, T]     int64: where in the cache each row's key and value go
    table      [B, P]     int64: the pages that hold the session's positions 0 .. P * PAGE - 1

Page 0 belongs to nobody: rows that only fill up a batch write there.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

try:
    from .decode_attention import decode_attention
except ImportError:  # a PyTorch without Triton
    decode_attention = None

PAGE = 64  # positions
ALIGNMENT = 256  # bytes, of what a graph reads
WARM_UP_ROWS = (2, 16, 128, 512)
# Of steps of several rows: those that there are graphs for. Up to some hundred rows the layers take
# as long as their weights take to read, so that few sizes are enough. Beyond them, and beyond so
# many positions, a step's kernels are launched one by one.
PROMPT_ROWS = (32, 128, 256, 512)
PROMPT_PAGES = (8, 32, 128)
ATTENTION = "infemeral_paged"


@torch.library.custom_op("infemeral::paged_attention", mutates_args=("key_pages", "value_pages"))
def paged_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    key_pages: torch.Tensor, value_pages: torch.Tensor, slots: torch.Tensor,
                    table: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor,
                    scaling: float) -> torch.Tensor:
    """query [B, heads, T, D], key and value [B, kv_heads, T, D], pages [n, PAGE, kv_heads, D], bias
    [B, 1, group * T, P * PAGE], or empty where decode_attention takes the rows; the result is
    [B, T, heads, D].

    One operation to the compiler: what it makes of a layer then does not depend on the length of
    the sessions.
    """
    if bias.numel() == 0:
        return decode_attention(query, key, value, key_pages, value_pages, slots, table, positions,
                                scaling)
    b, heads, t, d = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # Behind the last row are rows that were cut off, and page 0, where anybody's rows end up that
    # only fill up a batch. A bias does not hide what is not finite there: NaN - inf and 0 * NaN are
    # NaN.
    unseen = (bias[:, 0, -1] < 0).view(b, -1, 1, 1)
    caches = []
    for pages, new in ((key_pages, key), (value_pages, value)):
        rows = new.transpose(1, 2).reshape(b * t, kv_heads, d)
        pages.view(-1, kv_heads, d).index_copy_(0, slots.view(-1), rows)
        # [B, P * PAGE, kv_heads, D] as [B, kv_heads, P * PAGE, D]
        cached = pages.index_select(0, table.view(-1)).view(b, -1, kv_heads, d)
        caches.append(cached.masked_fill_(unseen, 0).transpose(1, 2))
    # Query heads that share a key head are more rows of it: keys are neither repeated nor read
    # more than once.
    rows = query.reshape(b, kv_heads, group * t, d)
    # Flash attention takes no bias, and cuDNN would plan anew for every shape.
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if query.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(rows, *caches, attn_mask=bias, scale=scaling)
    return out.reshape(b, heads, t, d).transpose(1, 2).contiguous()


@paged_attention.register_fake
def _(query, key, value, key_pages, value_pages, slots, table, positions, bias, scaling):
    b, heads, t, d = query.shape
    return query.new_empty(b, t, heads, d)


def _attention(module, query, key, value, attention_mask, scaling, slots, table, places, bias, **_):
    """What transformers calls in every layer, after RoPE."""
    return paged_attention(query, key, value, module.key_pages, module.value_pages, slots, table,
                           places, bias, scaling), None


# Without a mask function under the same name, transformers makes no mask of its own.
AttentionInterface.register(ATTENTION, _attention)


@torch.library.custom_op("infemeral::product", mutates_args=())
def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows * weight^T by cuBLAS, whatever the compiler would choose."""
    return F.linear(rows, weight)


@product.register_fake
def _(rows, weight):
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


class JoinedMlp(torch.nn.Module):
    """transformers' gated MLP with gate and up as one matrix: for a single row, one long product
    comes closer to the memory's speed than two."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.gate_up = torch.nn.Parameter(
            torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), requires_grad=False)
        self.down = mlp.down_proj.weight
        self.act_fn = mlp.act_fn

    @staticmethod
    def fits(mlp: torch.nn.Module) -> bool:
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        return hasattr(mlp, "act_fn") and all(
            type(part) is torch.nn.Linear and part.bias is None for part in parts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.gate_up).chunk(2, -1)
        # The compiler's own kernel for so wide a row reaches four fifths of cuBLAS's speed.
        return product(self.act_fn(gate) * up, self.down)


@dataclass
class ModelOptions:
    decode: str       # "eager", "graph" or "compile"
    max_batch: int    # sessions whose single rows run together
    max_context: int  # positions
    pages: int        # of the KV cache; 0: it grows as needed (not with "graph")
    log: Callable[[str, str], None]


def buckets(limit: int, smallest: int = 1) -> list[int]:
    """smallest, twice that, ..., limit."""
    sizes = []
    while smallest < limit:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, limit]


def up_to(limit: int, sizes: Sequence[int]) -> list[int]:
    """Those below the limit, and the first that reaches it, cut to it."""
    below = [size for size in sizes if size < limit]
    return below + [min(size, limit) for size in sizes if size >= limit][:1]


def out_of_memory(error: BaseException | None) -> bool:
    """Of a GPU or of this machine; also where another error came of it, as at the end of a graph's
    capture."""
    while error is not None:
        if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
                or "CUDA error: out of memory" in str(error)
                or "DefaultCPUAllocator: can't allocate" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class TorchModel:
    def __init__(self, model: torch.nn.Module, options: ModelOptions):
        """`model`: an AutoModel with attn_implementation=ATTENTION, on its device. Captures every
        graph now, so that no step waits for one."""
        self.model = model.eval()
        config = model.config
        parameter = next(model.layers.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.hidden_size = config.hidden_size
        self._group = config.num_attention_heads // config.num_key_value_heads
        self._options = options
        self._attentions = [layer.self_attn for layer in model.layers]
        # A rank of a tensor-parallel group has its share of the heads.
        head_dim = self._attentions[0].head_dim
        k_proj = self._attentions[0].k_proj.weight
        k_proj = k_proj.to_local() if hasattr(k_proj, "to_local") else k_proj
        self._page_shape = (PAGE, k_proj.shape[0] // head_dim, head_dim)
        self._n_pages = 0
        self._resize(max(options.pages, 2))
        self._decodes = self.device.type == "cuda" and self._try_decode_attention()
        self._compiled = False
        self._graphs: dict[tuple[int, int], "StepGraph"] = {}         # by batch and pages
        self._prompt_graphs: dict[tuple[int, int], "StepGraph"] = {}  # by rows and pages
        self._batches = buckets(options.max_batch)
        # Short sessions do not read the pages of long ones; 256 positions cost next to nothing.
        self._tables = buckets(-(-options.max_context // PAGE), smallest=4)
        if options.decode == "compile":
            self._compile()
        if self.device.type == "cuda":
            if options.decode != "eager":
                self._capture()
            self._warm_up()

    @property
    def page_bytes(self) -> int:
        """Of one page over all layers, on this rank."""
        elements = self._page_shape[0] * self._page_shape[1] * self._page_shape[2]
        return 2 * len(self._attentions) * elements * self.dtype.itemsize

    # ---- the cache ----

    def _resize(self, pages: int) -> None:
        places = [(attention, name) for attention in self._attentions
                  for name in ("key_pages", "value_pages")]
        # All before one is put in: where the memory ends on the way, the cache stays as it was.
        tensors = [torch.zeros((pages, *self._page_shape), dtype=self.dtype, device=self.device)
                   for _ in places]
        for (attention, name), tensor in zip(places, tensors):
            if self._n_pages > 0:
                tensor[:self._n_pages] = getattr(attention, name)
            setattr(attention, name, tensor)
        self._n_pages = pages

    def _grow(self, needed: int) -> None:
        for pages in (max(needed, 2 * self._n_pages), needed):
            try:
                return self._resize(pages)
            except Exception as error:
                if pages == needed or not out_of_memory(error):
                    raise

    @torch.no_grad()
    def wipe(self, pages: np.ndarray) -> None:
        pages = torch.from_numpy(pages[pages < self._n_pages]).to(self.device)
        for attention in self._attentions:
            attention.key_pages.index_fill_(0, pages, 0)
            attention.value_pages.index_fill_(0, pages, 0)

    def device_works(self) -> bool:
        """After a kernel's fault every call fails until the process ends."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return True
        except RuntimeError:
            return False

    # ---- a step ----

    @torch.no_grad()
    def run(self, states: np.ndarray, positions: np.ndarray, slots: np.ndarray, table: np.ndarray,
            back: int) -> np.ndarray:
        """The result: [B, back, H] float32, normed, of the last rows; the next run may use its
        memory again. The step is done when this returns, also when nothing comes back."""
        needed = int(table.max()) + 1
        if needed > self._n_pages:
            self._grow(needed)
        t = states.shape[1]
        if t == 1 and self._graphs:
            return self.decode(states, positions[:, 0].tolist(), table.tolist(), back)
        if len(states) == 1 and (graph := self._prompt_graph(t, table.shape[1])) is not None:
            return graph.run(states, positions, slots, table, back)
        return self._launch(states, positions, slots, table, back)

    @torch.no_grad()
    def _launch(self, states, positions, slots, table, back: int) -> np.ndarray:
        """run() without a graph."""
        on_device = (torch.from_numpy(x).to(self.device)
                     for x in (states, positions, slots, table))
        out = self.forward(*on_device, back=back).cpu()
        if back == 0 and self.device.type == "cuda":  # no copy has waited for the step
            torch.cuda.current_stream().synchronize()
        return out.numpy()

    def _prompt_graph(self, rows: int, pages: int) -> "StepGraph | None":
        return next((self._prompt_graphs[size] for size in sorted(self._prompt_graphs)
                     if size[0] >= rows and size[1] >= pages), None)

    @property
    def has_graphs(self) -> bool:
        return bool(self._graphs)

    def decode(self, rows: Sequence[np.ndarray], positions: list[int], tables: list[list[int]],
               back: int) -> np.ndarray:
        """run() of single rows [1, H], by a graph: what is between a step's coming and the graph's
        start is waited for, so these are no arrays. A table may hold more pages than it needs."""
        pages = max(positions) // PAGE + 1
        batch = next(size for size in self._batches if size >= len(rows))
        width = next(size for size in self._tables if size >= pages)
        return self._graphs[batch, width].replay(rows, positions, tables)[:len(rows), :back]

    def forward(self, states, positions, slots, table, back: int = 1) -> torch.Tensor:
        """The same on the device, as it is captured."""
        if states.shape[1] == 1 and self._decodes:
            bias = states.new_empty(0)
        else:
            bias = self._bias(positions, table.shape[1] * PAGE)
        if self._compiled:
            torch._dynamo.maybe_mark_dynamic(table, 1)
            if bias.numel() > 0:
                torch._dynamo.maybe_mark_dynamic(bias, 3)
        # Compiled layers are for single rows; other shapes would be compiled one by one.
        eager = states.shape[1] > 1 and self._compiled
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            # transformers keeps position_ids for itself.
            result = self.model(inputs_embeds=states.to(self.dtype), position_ids=positions,
                                use_cache=False, slots=slots, table=table, places=positions,
                                bias=bias)
        return result.last_hidden_state[:, states.shape[1] - back:].float()

    def _bias(self, positions: torch.Tensor, size: int) -> torch.Tensor:
        """0 for the cached positions that a row sees, minus infinity for the others."""
        b, t = positions.shape
        hidden = torch.arange(size, device=self.device) > positions[:, :, None]  # [B, T, size]
        bias = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        bias = bias.masked_fill_(hidden, float("-inf"))[:, None, None]
        bias = bias.expand(b, 1, self._group, t, size)
        return bias.reshape(b, 1, self._group * t, size)

    def _warm_up(self) -> None:
        """Steps of several rows, as a prompt's: the first of them load kernels and choose among
        them, which takes several times as long as the step. Their keys go to page 0."""
        for rows in WARM_UP_ROWS:
            rows = min(rows, self._options.max_context)
            positions = np.arange(rows)[None]
            self._launch(np.zeros((1, rows, self.hidden_size), np.float32), positions,
                         positions % PAGE, np.zeros((1, -(-rows // PAGE)), np.int64), back=1)

    # ---- single rows, fast ----

    @torch.no_grad()
    def _try_decode_attention(self) -> bool:
        """Whether Triton works here: it needs a C compiler at run time. Row 0 of page 0, which
        belongs to nobody, is written."""
        try:
            if decode_attention is None:
                raise ImportError("this PyTorch has no Triton")
            attention = self._attentions[0]
            kv_heads, head_dim = self._page_shape[1:]
            zeros = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
            rows = torch.zeros((1, kv_heads * self._group, 1, head_dim), dtype=self.dtype,
                               device=self.device)
            decode_attention(rows, rows[:, :kv_heads], rows[:, :kv_heads], attention.key_pages,
                             attention.value_pages, zeros, zeros, zeros, 1.0)
            torch.cuda.synchronize(self.device)
            return True
        except Exception as error:  # of many kinds, from Triton and from what it calls
            self._options.log("warning", f"Triton does not work here ({type(error).__name__}); "
                                         "single rows attend by PyTorch's own, slower kernels")
            logging.getLogger(__name__).debug("Triton", exc_info=error)
            return False

    def _compile(self) -> None:
        # A rank of several has its share of the weights as transformers' plan laid it out.
        for layer in self.model.layers:
            if not torch.distributed.is_initialized() and JoinedMlp.fits(layer.mlp):
                layer.mlp = JoinedMlp(layer.mlp)
        # Layer by layer: all of them are the same code, which is compiled once. With this option
        # products of a single row become kernels of the compiler's own, which take norms, RoPE and
        # residuals in.
        for layer in self.model.layers:
            layer.compile(options={"coordinate_descent_tuning": True})
        self._compiled = True
        try:
            StepGraph(self, 1, 1, self._tables[0]).forward()
        except Exception as error:  # no compiler on this machine, or a model that it cannot take
            self._options.log("warning", f"cannot compile the layers ({type(error).__name__}); "
                                         "they run as they are")
            logging.getLogger(__name__).debug("compilation", exc_info=error)
            for layer in self.model.layers:
                layer._compiled_call_impl = None
            self._compiled = False

    def _capture(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit the memory that it took.
        context = self._options.max_context
        for rows in reversed(up_to(context, PROMPT_ROWS)):
            for width in reversed(up_to(-(-context // PAGE), PROMPT_PAGES)):
                graph = StepGraph(self, 1, rows, width)
                graph.capture(pool, transfers=True)
                self._prompt_graphs[rows, width] = graph
        for batch in reversed(self._batches):
            for width in reversed(self._tables):
                graph = StepGraph(self, batch, 1, width)
                graph.capture(pool, transfers=True)
                self._graphs[batch, width] = graph

    def drop_graphs(self) -> None:
        self._graphs.clear()
        self._prompt_graphs.clear()


class StepGraph:
    """A step as a CUDA graph of fixed shapes: one row for each of a batch of sessions, or several
    rows of one. Those that nobody asks for go to position, slot and page 0."""

    def __init__(self, model: TorchModel, batch: int, rows: int, width: int):
        pinned = model.device.type == "cuda"
        # The step's arrays one behind the other, so that one copy brings them all.
        shapes = [((batch, rows, model.hidden_size), torch.float32), ((batch, rows), torch.int64),
                  ((batch, rows), torch.int64), ((batch, width), torch.int64)]
        ends = list(itertools.accumulate(
            -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            for shape, dtype in shapes))
        self._host = torch.zeros(ends[-1], dtype=torch.uint8, pin_memory=pinned)
        self._device = self._host.to(model.device)

        def parts(memory: torch.Tensor) -> list[torch.Tensor]:
            return [memory[begin:begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                    for begin, (shape, dtype) in zip([0, *ends], shapes)]

        self._states, self._positions, self._slots, self._table = (
            part.numpy() for part in parts(self._host))
        self.inputs = parts(self._device)
        self._model = model
        self._rows = rows
        self._graph: torch.cuda.CUDAGraph | None = None
        self.out = None  # [batch, rows, H], on the device
        self._result = torch.empty((batch, 1, model.hidden_size), pin_memory=pinned)
        self._last_rows = self._result.numpy()
        self._used = 0  # sessions of the last replay, or rows of the last run

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self._model.forward(*self.inputs, back=self._rows)

    @torch.no_grad()
    def capture(self, pool, transfers: bool) -> None:
        """Without transfers, the step is what `inputs` hold and the result stays in `out`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries take their memory
            for _ in range(2):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog) may use the device meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            if transfers:
                self._device.copy_(self._host, non_blocking=True)
            self.out = self.forward()
            if transfers:
                self._result.copy_(self.out[:, -1:], non_blocking=True)
        self.start()  # brings the graph to the device, which its first step would wait for

    def start(self) -> None:
        self._graph.replay()

    def replay(self, rows: Sequence[np.ndarray], positions: list[int],
               tables: list[list[int]]) -> np.ndarray:
        """Single rows. [batch, 1, H] on the host; its memory is the next replay's too."""
        for i, position in enumerate(positions):
            page = position // PAGE
            self._states[i] = rows[i]
            self._positions[i, 0] = position
            self._slots[i, 0] = tables[i][page] * PAGE + position % PAGE
            self._table[i, :page + 1] = tables[i][:page + 1]
            self._table[i, page + 1:] = 0
        for i in range(len(rows), self._used):
            for part in (self._states, self._positions, self._slots, self._table):
                part[i] = 0
        self._used = len(rows)
        self.start()
        torch.cuda.current_stream().synchronize()
        return self._last_rows

    def run(self, states: np.ndarray, positions: np.ndarray, slots: np.ndarray, table: np.ndarray,
            back: int) -> np.ndarray:
        """TorchModel.run() of rows of one session. The last ones are theirs: where they end does
        not depend on their number."""
        rows, pages = states.shape[1], table.shape[1]
        filled = self._rows - rows
        self._states[:, filled:] = states
        self._states[:, self._rows - max(self._used, rows):filled] = 0  # an earlier step's
        self._used = rows
        for part, values in ((self._positions, positions), (self._slots, slots)):
            part[:, :filled] = 0
            part[:, filled:] = values
        self._table[:, :pages] = table
        self._table[:, pages:] = 0
        self.start()
        torch.cuda.current_stream().synchronize()
        return self._last_rows[:, :back] if back < 2 else self.out[:, -back:].cpu().numpy()
