"""After the first steps: does it learn, and if it cannot, the likely reason."""
import math
import statistics

AFTER = 20                             # steps; the first ten are compared with the last ten
T95 = 2.10                             # of Student's distribution for ten and ten, two-sided

def change(rows: list[dict], name: str) -> tuple[float, float, float]:
    """Mean of a column in the first and in the second half of the rows, and half the width of the
    95 % interval of the difference, as if steps were independent (prompts are drawn anew)."""
    values = [float(row[name]) for row in rows]
    halves = values[:len(values) // 2], values[len(values) // 2:]
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    return *map(statistics.mean, halves), T95 * error

def usable(row: dict) -> bool:
    """Whether a row of the log has numbers, of a step that was applied."""
    try:
        return all(abs(float(v)) < 1e100 for v in row.values() if v != "") and not float(
            row["skipped"])
    except (KeyError, TypeError, ValueError):
        return False

def verdict(rows: list[dict], unfinished: list[float]) -> str:
    """rows: of the log; unfinished: of each rollout the share of completions without an end. A
    line, and a second one where the rewards teach nothing; "" for too few rows."""
    rows = list(filter(usable, rows))
    if len(rows) < AFTER - 3:                                  # T95 is for about as many
        return ""
    (r0, r1, r), (s0, s1, s) = change(rows, "reward"), change(rows, "solved")
    rises = r1 - r0 > r
    word = ("the reward rises" if rises else "the reward falls: a lower --lr may help"
            if r0 - r1 > r else "no change beyond the noise so far")
    text = (f"after {len(rows)} steps: {word}. Reward {r0:.2f} (first {len(rows) // 2}) -> {r1:.2f}"
            f" (last {len(rows) // 2}), change {r1 - r0 - r:+.2f} to {r1 - r0 + r:+.2f} (95 %); "
            f"solved {100 * s0:.1f} -> {100 * s1:.1f} %, change {100 * (s1 - s0 - s):+.1f} to "
            f"{100 * (s1 - s0 + s):+.1f}")
    why = "" if rises else cause(rows, statistics.mean(unfinished or [0.0]), r0 - r1 > r)
    return "".join(f"{line}\n" for line in (text, why) if line)

def cause(rows: list[dict], unfinished: float, falls: bool) -> str:
    """Why the rewards teach nothing; "" where they may."""
    def never(name):
        return all(float(row[name]) == 0 for row in rows)
    parts = [name for name in rows[0] if name.startswith("reward_") and name != "reward_overlong"]
    if parts and all(map(never, parts)):
        if unfinished > 0.5:
            return (f"no completion earns anything, and {100 * unfinished:.0f} % have no end: where"
                    " they are cut off before the answer a longer --completion-length helps")
        return ("no completion earns anything: the model does not write the format that the prompt "
                "asks for, another --prompt or --sft gold first may help")
    if never("solved"):
        return ("no answer was right: is the task too hard for the model, or has --data answers in "
                "another form? python eval.py --model MODEL --limit 20 shows some")
    idle = sum(float(row["passes"]) == 0 == float(row["grad_norm"]) for row in rows)
    if idle >= len(rows) / 2 and not falls and change(rows, "solved")[1] < 0.9:
        return (f"in {idle} of {len(rows)} steps the rewards of each group are all equal, nothing "
                "to learn from: a higher --temperature, more --completions, other examples, or in "
                "`parts` of a task of your own credit for half an answer may help")
    return ""
