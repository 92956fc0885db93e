// Docstrings of the classes and methods in rollout_bindings.cpp: what a generator has to know to run on them.
#pragma once

namespace athanor::docs {

inline constexpr const char* out_of_blocks = "A BlockPool has fewer free blocks than were asked for; the message has both numbers.";

inline constexpr const char* block_pool =
    R"(Reference-counted blocks 0 to num_blocks - 1 of block_size KV slots each.  It counts; the bytes are the caller's.

A block has as many holders as times it was allocated (1), retained or shared by fork, less the times it was released; without any it is free.
Free blocks are a stack: what was released last is handed out first.  Every refused call leaves the pool as it was.
Raises ValueError on num_blocks or block_size out of range.)";

inline constexpr const char* allocate = R"(Take `count` free blocks, one holder each.  Returns (count,) int32.

Raises OutOfBlocks where fewer are free, ValueError on a negative count.)";

inline constexpr const char* retain = R"(Add a holder to each block; a block named twice gets two.

Raises ValueError on a block that is out of range or free.)";

inline constexpr const char* release = R"(Take a holder from each block; a block without any is free again.

Raises ValueError on a block that is out of range, or named more often than it has holders.)";

inline constexpr const char* fork = R"(Block tables of `num_children` sequences that continue one of `num_tokens` tokens in `blocks` (its whole table).

The children hold the parent's full blocks by reference and get a block of their own for its last, partly filled one.  The parent keeps its
own.  Returns (tables (num_children, len(blocks)) int32, copies (c, 3) int32: source block, target block, tokens), c = num_children where
num_tokens is no multiple of block_size, else 0.
Raises OutOfBlocks where the copies have no room, ValueError where num_tokens does not fill `blocks` up to the last one or a block is free.)";

inline constexpr const char* make_writable = R"(The block to write to behind the first `num_tokens` tokens of `block`: copy-on-write.

Returns (block, copies): `block` itself and no copy where it has one holder; otherwise a new block, for which the caller has given up its
reference to the old one, and the copy (1, 3) int32 to make first (none where num_tokens is 0).
Raises OutOfBlocks, and ValueError on a free block or num_tokens outside 0..block_size.)";

inline constexpr const char* admission = R"(What a prefill has to do, from Scheduler.admit(): q requests in m rows.  len() is q; arrays are views.

Request i decodes in rows[row_offsets[i]:row_offsets[i + 1]].  In this order:
1. set the device's block table from `blocks`, lengths, seeds, ... of the rows from the scheduler's views;
2. where needs_prefill[i]: run the prompt once and write its KV to prompt_blocks[block_offsets[i]:block_offsets[i + 1]];
3. make `copies`: each member gets its own copy of the block that the prompt fills in part;
4. rows with generated > 0 (resumed): run those tokens behind the prompt, KV through the row's block table, columns >= shared_blocks;
5. draw each row's next token and call scheduler.advance(done, first=first_row).
Where the group was split (waiting_members(request) > 0), keep the last hidden state of the prompt: later members draw from it without a prefill.)";

inline constexpr const char* events = R"(What has changed, from Scheduler.advance() and abort().  False where only lengths have; arrays are views.

Apply it to the device's copies in this order: read the tokens of finished_rows; per-row state (tokens, log-probs, lengths, block table, ...)
by `moves`, x[moves[:, 1]] = x[moves[:, 0]] at once; null blocks and length 0 in cleared_rows; block_table[row, column] = block for `blocks`.
KV never moves.  After the moves rows 0..num_active - 1 decode.)";

inline constexpr const char* scheduler =
    R"(Rows, blocks and order of a continuous batch of groups.  Deterministic: the same calls give the same schedule.

num_rows: samples that decode or are paused at one time.  max_length: tokens of a row, prompt + generated.  num_blocks x block_size: the KV pool.
policy: "reserve" admits a group when its worst case fits beside that of the rows in flight.  "pause" admits by expected length; a row that
finds no block pauses with its KV in rows num_rows.. of the tables and goes on as soon as it can, oldest first.  The oldest row always finds its
blocks, so there is no deadlock, and no KV is ever computed twice.
split_groups: admit as many members of the next request as fit, not all or none.
lookahead: tokens that a row may gain between two calls (k steps launched ahead): its table always covers them.
refill_rows: admit only when so many rows are free, fewer members wait, or none is in flight.
aging: tokens of expected length that a step of waiting is worth.  Requests go by expected_new_tokens + priority, highest first, so with aging
> 0 no later request overtakes one that is spread / aging steps older; 0 allows starvation.  Nobody overtakes a request that does not fit yet.
null_block: what unused entries of block_table hold: -1, or a scratch block outside the pool, num_blocks or above.

A row has `lengths` tokens, of which the last drawn has no KV yet: a decode step writes slot lengths - 1 and reads slots 0..lengths - 1.
The row tables are zero-copy views at fixed addresses, valid after every call, and writable so that torch.from_numpy takes them; the scheduler
never reads them.  Rows that are free or paused lie behind the active ones; those from num_active to num_rows - 1 are free (length 0).

    while scheduler.num_requests:
        admission = scheduler.admit()
        if len(admission):
            tokens = prefill(admission)
            apply(scheduler.advance(ended(tokens), first=admission.first_row))
        tokens = decode(scheduler.num_active)
        apply(scheduler.advance(ended(tokens)))

Raises ValueError on a number out of range or an unknown policy.)";

inline constexpr const char* submit = R"(Queue `num_members` samples of one prompt and return the request's number (0, 1, 2, ...).

seeds: (num_members,) int64, default zeros.  expected_new_tokens: 1..max_new_tokens (the default), the order and the "pause" policy go by it.
priority: tokens added to it in the order.  generated: (num_members,) ints, tokens that each member has already (resume of partial samples: they
count into max_new_tokens and are prefilled behind the prompt), default zeros.
Raises ValueError on a number out of range, a group larger than num_rows (unless split) and a request that does not fit into the pool alone.)";

inline constexpr const char* set_expected = R"(Correct a request's expected length, say by its first finished sibling; moves it in the queue.

Raises ValueError on an unknown request or a length outside 1..max_new_tokens.)";

inline constexpr const char* admit = R"(Give rows and blocks to the requests that are next and fit.  Returns an Admission, of length 0 if there are none.

max_prefill_tokens: stop before the tokens to prefill exceed it; the first request goes in any case.  Nothing is admitted while a row is paused.
The new rows have lengths = prompt + generated and are active: the caller draws a token for each and calls advance().)";

inline constexpr const char* advance = R"(Account for the tokens drawn since the last call, for rows first..num_active - 1.  Returns Events.

done: (num_active - first,) bool, rows that ended (the token that ended them is counted); rows that reach max_length end by themselves.
appended: (num_active - first,) ints, tokens that each row has gained, 0..lookahead; default 1 each.
Ended rows free their blocks at once, rows that go on get the blocks for their next `lookahead` steps or pause, the active rows close up.
Raises ValueError where done or appended have another shape or type, or a row gained more than it could; then nothing has changed.)";

inline constexpr const char* abort = R"(End a request, or one member of it, and free its rows and blocks at once.  Returns Events.

The tokens of its running rows are still where finished_rows says: submit them again with `generated` to go on later.
Raises ValueError on a request that is unknown or has finished, and on such a member.)";

inline constexpr const char* groups = R"(Active rows by request, for attention that reads a shared prompt once.

Returns (offsets (g + 1,) int32, rows (num_active,) int32, shared_blocks (g,) int32): rows[offsets[i]:offsets[i + 1]] begin with the same
shared_blocks[i] blocks.  Requests ascend, and members within one.  Changes only with an admission or with moves or finished rows.)";

}  // namespace athanor::docs
