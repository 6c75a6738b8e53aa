"""Judges an answer: right, wrong, or not judged because the comparison took too long or too much memory.

    response ─► commitment ──► forms ──► verdict ──► Verdict
                the first      cleaned     │  equal text, option letters, words, numbers with units: here
                answer in it   answers     └► pool ─► worker, a process: math-verify under a time and memory limit

Arrives: a response's text and a reference. Leaves: a `Verdict`. The bound holds from any thread, without signals there.
"""

from vaopd.grading.commitment import committed_answer
from vaopd.grading.pool import prepare
from vaopd.grading.verdict import Verdict, judge, judge_version

__all__ = ["Verdict", "committed_answer", "judge", "judge_version", "prepare"]
