"""After the first steps: does it learn, and if it cannot, the likely reason."""
import math
import statistics

AFTER = 20                             # steps; the first half is compared with the second

def change(rows: list[dict], name: str) -> tuple[float, float, float]:
    """Mean of a column in the first and in the second half of the rows, and half the width of the
    95 % interval of their difference: steps are independent draws of prompts."""
    values = [float(row[name]) for row in rows]
    halves = values[:len(values) // 2], values[len(values) // 2:]
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in halves))
    return *map(statistics.mean, halves), 1.96 * error

def verdict(rows: list[dict], unfinished: list[float]) -> str:
    """rows: of the log, AFTER of them; unfinished: of each step the share of completions that never
    end. One line, and where no reward can teach anything a second one."""
    (r0, r1, r), (s0, s1, s) = change(rows, "reward"), change(rows, "solved")
    word = ("it learns" if r1 - r0 > r else "it falls: a lower --lr may help" if r0 - r1 > r else
            "no change beyond the noise yet")
    text = (f"after {len(rows)} steps: reward {r0:.2f} -> {r1:.2f} ({r1 - r0 - r:+.2f} to "
            f"{r1 - r0 + r:+.2f}), solved {100 * s0:.1f} -> {100 * s1:.1f} % "
            f"({100 * (s1 - s0 - s):+.1f} to {100 * (s1 - s0 + s):+.1f}), first half and second, "
            f"95 % intervals of the change: {word}")
    return "\n".join(filter(None, (text, cause(rows, statistics.mean(unfinished or [0.0])))))

def cause(rows: list[dict], unfinished: float) -> str:
    """Why the rewards teach nothing; "" where they may."""
    def never(name):
        return all(float(row[name]) == 0 for row in rows)
    parts = [name for name in rows[0] if name.startswith("reward_")]
    form = [name for name in parts if name not in ("reward_correct", "reward_overlong")]
    if form and all(map(never, form)):
        if unfinished > 0.5:
            return (f"no completion has the format, and {100 * unfinished:.0f} % of them never end:"
                    " they are cut off before the answer, a longer --completion-length may help")
        return ("no completion has the format that the prompt asks for: another --prompt, or --sft "
                "gold first")
    if "reward_correct" in parts and never("reward_correct"):
        return ("no answer was right: look at some with eval.py; is the task too hard for the "
                "model, or has --data its answers in another form?")
    if never("passes"):
        return ("the rewards of each group are all equal, nothing to learn from: a higher "
                "--temperature, more --completions, harder or easier examples")
    return ""
