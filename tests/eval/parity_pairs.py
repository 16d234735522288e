r"""(metric, gold, choices, prediction) tuples on which our verdicts are compared with those of LightEval 0.13.0.

`lighteval_verdicts.json` contains LightEval's verdicts, one character per tuple ("1" right, "0" wrong). To regenerate:

    python -m venv /tmp/lighteval && /tmp/lighteval/bin/pip install torch==2.13.0 'lighteval[math]==0.13.0'
    /tmp/lighteval/bin/python tests/eval/parity_pairs.py FOLDER > tests/eval/lighteval_verdicts.json

FOLDER contains math_500.jsonl and aime_2024.jsonl of the Hub's data sets, whose answers are used in these phrases, too.
"""

import json
import random
import sys
from pathlib import Path

Quadruple = tuple[str, str, list[str], str]

# gold, other ways to write it, near misses
LATEX = [
    (
        r"\frac{3}{4}",
        [r"\dfrac34", "0.75", r"75\%", r"\frac{6}{8}", "3/4"],
        ["0.7", r"\frac{4}{3}", r"\frac34 \pi", "75"],
    ),  # noqa: E501
    (r"-\frac{2}{7}", [r"\frac{-2}{7}", "-2/7", r"-\tfrac27"], [r"\frac27", "-0.29"]),
    (
        "12",
        ["12.0", r"12\text{ cm}", r"12 \text{ units}", "{12}", r"\text{12}", "x = 12", "12.", "+12"],
        ["-12", "120", "1.2", r"12\%"],
    ),  # noqa: E501
    (r"1,\!250", ["1250", "1,250", "1250.00", r"1{,}250", r"\$1250"], ["1.25", "125", "1,2"]),
    (r"15\%", ["15", "0.15", r"15 \%", "15%", r"15\text{ percent}"], ["1500", "1.5"]),
    (r"\$4.50", ["4.5", "4.50", r"\$4.5", r"4.50\text{ dollars}"], ["450", "4.05"]),
    (r"90^\circ", ["90", r"90^{\circ}", r"90\text{ degrees}", r"\frac{180}{2}"], [r"\frac{\pi}{2}", "9"]),
    (
        r"2\sqrt{3}",
        [r"\sqrt{12}", r"2 \cdot \sqrt 3", r"\frac{6}{\sqrt{3}}", "3.46410"],
        [r"3\sqrt{2}", "3.46", r"\sqrt{3}"],
    ),  # noqa: E501
    (r"\frac{\pi}{6}", [r"\pi/6", r"\frac{1}{6}\pi", r"\frac{2\pi}{12}"], [r"\frac{\pi}{3}", "30", "0.52"]),
    (r"x^2 + 2x + 1", ["(x+1)^2", "1 + 2x + x^2", "x(x+2)+1"], ["x^2 - 2x + 1", "y^2+2y+1", "x^2+2x"]),
    (r"\{1, 2, 5\}", ["1,2,5", r"\{5,1,2\}", r"\left\{1,2,5\right\}"], [r"\{1,2\}", "(1,2,5,6)"]),
    (r"1, -2", ["-2, 1", r"\{-2,1\}", "1,-2", r"x=1, x=-2"], ["1, 2", "-2"]),
    (
        r"(3, 4)",
        [r"\left(3,4\right)", "(3, 4)", "(3.0,4.0)", r"\left( 3, \frac{8}{2} \right)"],
        ["(4,3)", "[3,4]", "3,5"],
    ),  # noqa: E501
    (r"[1, 4)", [r"\left[1,4\right)", "[1,4)", r"1 \le x < 4", r"x \in [1, 4)"], ["(1,4)", "[1,4]", "[1, 5)"]),
    (
        r"(-\infty, 2) \cup (3, \infty)",
        [r"(3,\infty)\cup(-\infty,2)", r"(-\infty,2)\cup(3,+\infty)"],
        [r"(-\infty,2]\cup(3,\infty)", r"(2,3)"],
    ),  # noqa: E501
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)"],
        [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"],
    ),  # noqa: E501
    (
        r"\begin{pmatrix} -1/3 \\ 2 \end{pmatrix}",
        [r"\begin{pmatrix} -\frac13 \\ 2 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2.0 \end{pmatrix}"],
        [r"\begin{pmatrix} 2 \\ -1/3 \end{pmatrix}"],
    ),  # noqa: E501
    (r"\text{Evelyn}", [r"\text{ Evelyn}", r"\mathrm{Evelyn}", "Evelyn"], [r"\text{Carla}", "E"]),
    (r"\text{(C)}", [r"\text{C}", "(C)", "C"], [r"\text{(B)}", "D"]),
    (r"3 + 4i", ["4i+3", r"3+4\,i"], ["3-4i", "7i"]),
    (r"y = 2x + 3", ["2x+3", "y=3+2x", "y - 2x = 3", "y-2x-3=0"], ["y=2x-3", "x=2y+3"]),
    (r"101101_2", [r"101101_{2}", "101101"], [r"101100_2"]),
    (r"x \in [-2, 7]", ["[-2,7]", r"-2 \le x \le 7", r"-2\leq x\leq 7"], ["(-2,7)", "[2,7]"]),
    (r"\frac{1}{2}, \frac{3}{2}", [r"\frac{3}{2},\frac12", "0.5, 1.5"], [r"\frac12"]),
    (r"5.4 \text{ cents}", ["5.4", r"5.4\text{ cents}", "5.40"], ["54", "5.5"]),
    (r"\sqrt{51}", [r"\sqrt{51}", "51^{1/2}", "7.14143"], ["7.1", r"\sqrt{15}"]),
    (r"0.333333", [r"\frac13", "1/3"], ["0.3", "0.34"]),
    (r"2^{10}", ["1024", r"2^{10}", "32^2"], ["20", "2^9"]),
    (r"3\pi + \ln 2", [r"\ln(2)+3\pi", r"\log 2 + 3\pi"], [r"3\pi", r"3\pi - \ln 2"]),
    (r"\frac{x+1}{x-2}", [r"1+\frac{3}{x-2}", r"\frac{-x-1}{2-x}"], [r"\frac{x-1}{x-2}"]),
    (r"x = 3", ["3", "x=3", r"x = 3.0"], ["x = 4", "y = 4"]),
    (r"x < 5", ["x<5", "5 > x", r"(-\infty,5)"], ["x>5", r"x \le 5"]),
    (r"\pm 2", ["2, -2", r"\{2,-2\}", r"\pm 2"], ["2", r"\pm 3"]),
    (r"10^{-3}", ["0.001", r"\frac{1}{1000}", r"1 \times 10^{-3}"], ["0.01", "10^3"]),
]
NUMBERS = [
    ("204", ["204", "204.0", r"$204$", "0204", r"\frac{408}{2}"], ["240", "-204", "20.4"]),
    ("25", ["25", "+25", "25 apples", "$25", "5^2", "025", "٢٥", "２５"], ["52", "2.5", "25%", "25/2"]),
    ("0", ["0", "0.0", "00", r"$0$"], ["1", "10"]),
    ("1234", ["1,234", "1 234", "1234", r"1{,}234"], ["1,235", "234"]),
    ("-7", ["-7", r"$-7$", "-7.00", "−7"], ["7", "-77"]),
    ("3.5", ["3.5", "3,5", "7/2", r"$\frac72$", "3.50000001"], ["3.4", "35", "3.51"]),
    ("40%", ["40%", "0.4", "40 percent", r"$40\%$"], ["4%", "400"]),
    (r"p - q", ["p-q", "-q+p", r"p\,-\,q"], ["P-Q", "q-p", "p-Q"]),
    ("X", ["X", "{X}"], ["x", "Y", "X^2"]),
    (r"\text{Yes}", [r"\text{Yes}", r"\mathrm{Yes}"], [r"\text{yes}", r"\text{No}"]),
    (r"AB", ["AB", "A B", "BA"], ["ab", "aB", "AC"]),
    (r"y=\frac{1}{2}x+3", [r"y=\frac{x}{2}+3", "y = 0.5x+3", "2y=x+6"], ["y=2x+3", "y=x+3"]),
]
PHRASES = [
    "The answer is {m}.",
    "Therefore, \\boxed{{{a}}}",
    "So the area is $\\boxed{{{a}}}$ as required.",
    "{m}",
    "Final Answer: The final answer is {m}. I hope it is correct.",
    "**Answer:** {m}",
    "\\[ \\boxed{{{a}}} \\]",
    "We have \\[ s = {a} \\] and are done.",
    "{a}",
    "First \\boxed{{17}}, but in truth \\boxed{{{a}}}.",
    "I get \\boxed{{{a}}}. A check gives \\boxed{{17}} for the other one.",
    "Answer : {a}",
    "<think>maybe \\boxed{{17}}</think>It is \\boxed{{{a}}}.",
    "There are 3 cases and 4 ways; in all {m} of them",
    "The answer is {a}, which is 5 more than 2.",
    "$a = 3$ and $b = 4$. The final answer is\n\n$$ {a} $$",
    "answer: \\({a}\\)",
    "It equals ${a}$ or ${a}$",
    "**{a}**",
    "\\boxed{{ {a} }} units",
    "\\boxed{{{a}}}%",
]
CHOICES = [
    "Answer: {}",
    "The answer is ({}).",
    "**Answer: {}**",
    "{}",
    "{}. because it is so",
    "I think\n{}: yes",
    "It is {}",
    "final answer is {}",
    "Answer: $\\boxed{{{}}}$",
    "A thing that B knows; Answer: {} and no other",
    "answer {}",
    "Answer: {} or D",
    "The final answer is {}. I hope it is correct.",
    "ANSWER: **{}**",
    "",
    "Answer: {}\nAnswer: B",
    "The correct answer is: {}",
    "({})",
    "Answer:{}",
    "**{}**",
]
NOTHING = [
    "",
    "I do not know.",
    "The answer is unclear.",
    r"\boxed{}",
    "$",
    r"\boxed{12",
    "\\",
    "$$$$",
    r"\[ \boxed{12 \]",
]


def constructed() -> list[Quadruple]:
    """Constructed pairs: every gold in every phrase, alternately right and wrong, and every way to write it once."""
    rng, found = random.Random(0), []
    for gold, right, wrong in LATEX:
        found += _pairs(rng, "latex", rf"We conclude that it is $\boxed{{{gold}}}$.", gold, right, wrong)
    for gold, right, wrong in NUMBERS:
        found += _pairs(rng, "expr", gold, gold, right, wrong)
    for i, phrase in enumerate(CHOICES * 3):
        gold, said = "ABCD"[i % 4], rng.choice("ABCD")
        found.append(("gpqa", gold, list("ABCD"), phrase.format(said)))
    return found


def from_data(folder: Path) -> list[Quadruple]:
    """MATH-500 and AIME 2024: each gold in two phrases, another problem's answer, and every solution against itself."""
    rng, found = random.Random(1), []
    for file, metric, column in (("math_500", "latex", "solution"), ("aime_2024", "expr", "answer")):
        rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
        for row in rows:
            for said in (row["answer"], row["answer"], rng.choice(rows)["answer"]):
                text = rng.choice(PHRASES).format(a=said, m=f"${said}$")
                found.append((metric, row[column], [row[column]], text))
            found.append((metric, row[column], [row[column]], row["solution"]))
    return found


def _pairs(rng: random.Random, metric: str, gold_text: str, gold: str, right: list, wrong: list) -> list[Quadruple]:
    said = [gold, *right, *wrong, *rng.sample([gold, *right, *wrong], 3)]
    texts = [rng.choice(PHRASES).format(a=a, m=rng.choice([f"${a}$", a])) for a in said]
    texts += [f"so ${a}$" for a in right + wrong] + [rng.choice(NOTHING)]
    return [(metric, gold_text, [gold_text], text) for text in texts]


def main(folder: Path) -> None:
    from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
    from lighteval.metrics.utils.extractive_match_utils import (
        ExprExtractionConfig,
        IndicesExtractionConfig,
        LatexExtractionConfig,
    )
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc
    from lighteval.utils.utils import remove_reasoning_tags

    answer = (ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0))
    letters = (IndicesExtractionConfig(prefix_for_extraction="NativeLetters"),)
    targets = {"latex": ((LatexExtractionConfig(),), answer), "expr": ((ExprExtractionConfig(),), answer)}
    metrics = {
        name: MultilingualExtractiveMatchMetric(gold_extraction_target=gold, pred_extraction_target=pred, precision=5)
        for name, (gold, pred) in (targets | {"gpqa": (letters, letters)}).items()
    }
    verdicts = {}
    for name, quadruples in (("constructed", constructed()), ("from_data", from_data(folder))):
        verdicts[name] = ""
        for metric, gold, choices, text in quadruples:
            text = remove_reasoning_tags(text, [("<think>", "</think>")])
            doc = Doc(query="", choices=choices, gold_index=choices.index(gold))
            verdicts[name] += str(int(metrics[metric].compute(doc, ModelResponse(text=[text]))))
    print(json.dumps(verdicts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
