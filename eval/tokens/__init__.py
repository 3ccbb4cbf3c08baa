"""Token models judged: questions with known answers, who answers them, and what that cost."""

from .answers import Answer, answers, causal_answers
from .models import TokenModels, load_token_models, token_folder
from .tasks import TASKS, Example, Question, Task, file_questions, read_questions, task_questions

__all__ = [
    "TASKS",
    "Answer",
    "Example",
    "Question",
    "Task",
    "TokenModels",
    "answers",
    "causal_answers",
    "file_questions",
    "load_token_models",
    "read_questions",
    "task_questions",
    "token_folder",
]
