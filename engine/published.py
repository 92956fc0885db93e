"""Published pass@1 of the DeepSeek-R1 report (arXiv 2501.12948), in percent, to stand beside one's own: reference rows, not a comparison.

Tables 4 and 5 of version 1 (8 and 15 of version 2) and table 3 of version 2 (the stages).  Their protocol: up to 32,768 tokens, T = 0.6, top-p 0.95,
pass@1 as the mean of k samples (64 on AIME 2024 and GPQA, 16 on MATH-500, 8 on LiveCodeBench 2024-08 to 2025-01), cons@64 on AIME.  Codeforces is a
rating.  The report has no GSM8K, HumanEval, MBPP or AMC.
"""

SOURCE = "DeepSeek-R1 report, arXiv 2501.12948"
BENCHMARKS = {  # task: benchmark of the report
    "aime": "AIME 2024", "math": "MATH-500", "gpqa": "GPQA Diamond", "livecodebench": "LiveCodeBench", "mmlu": "MMLU",
}  # fmt: skip
COLUMNS = ("AIME 2024", "cons@64", "MATH-500", "GPQA Diamond", "LiveCodeBench", "Codeforces", "MMLU")
_TABLE = """
Claude-3.5-Sonnet-1022        16.0  -     78.3  65.0  38.9  717   88.3
GPT-4o-0513                   9.3   -     74.6  49.9  32.9  759   87.2
DeepSeek-V3                   39.2  -     90.2  59.1  36.2  1134  88.5
OpenAI-o1-mini                63.6  80.0  90.0  60.0  53.8  1820  85.2
OpenAI-o1-1217                79.2  -     96.4  75.7  63.4  2061  91.8
QwQ-32B-Preview               50.0  60.0  90.6  54.5  41.9  1316  -
DeepSeek-R1-Zero              77.9  -     95.9  75.8  50.0  1444  88.8
DeepSeek-R1-Dev1              59.0  -     94.2  66.1  57.5  1534  89.1
DeepSeek-R1-Dev2              74.0  -     95.9  70.7  63.5  1687  91.2
DeepSeek-R1-Dev3              78.1  -     95.4  71.2  64.6  1746  91.0
DeepSeek-R1                   79.8  -     97.3  71.5  65.9  2029  90.8
R1-Zero-Qwen-32B              47.0  60.0  91.6  55.0  40.2  -     -
R1-Distill-Qwen-1.5B          28.9  52.7  83.9  33.8  16.9  954   -
R1-Distill-Qwen-7B            55.5  83.3  92.8  49.1  37.6  1189  -
R1-Distill-Qwen-14B           69.7  80.0  93.9  59.1  53.1  1481  -
R1-Distill-Qwen-32B           72.6  83.3  94.3  62.1  57.2  1691  -
R1-Distill-Llama-8B           50.4  80.0  89.1  49.0  39.6  1205  -
R1-Distill-Llama-70B          70.0  86.7  94.5  65.2  57.5  1633  -
"""


def published_rows(task: str) -> list[dict]:
    """Rows {model, benchmark, pass@1 in [0, 1], cons@64 and rating where published} for a task by its kind; [] where the report has none."""
    benchmark = BENCHMARKS.get(task)
    if benchmark is None:
        return []
    rows = []
    for line in _TABLE.strip().splitlines():
        model, *cells = line.split()
        values = {name: None if cell == "-" else float(cell) for name, cell in zip(COLUMNS, cells, strict=True)}
        if values[benchmark] is None:
            continue
        row = {"model": model, "benchmark": benchmark, "pass@1": round(values[benchmark] / 100, 6)}
        if benchmark == "AIME 2024" and values["cons@64"] is not None:
            row["cons@64"] = round(values["cons@64"] / 100, 6)
        if benchmark == "LiveCodeBench" and values["Codeforces"] is not None:
            row["rating"] = values["Codeforces"]
        rows.append(row)
    return rows
