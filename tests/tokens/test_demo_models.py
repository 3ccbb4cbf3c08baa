"""The token models of the demo, as they ship."""

from fewstep.eval.tokens import answers, load_token_models, task_questions
from fewstep.eval.tokens.rows import token_rows

LENGTH = 32


def test_one_token_a_step_up_to_the_end_costs_less_than_padding_and_answers_as_well():
    models, questions = load_token_models("demo:tokens"), task_questions(range(4))
    rows = {row.name: row.recipe for row in token_rows(models, [], questions[0], LENGTH).rows}
    whole, short = (answers(models, questions, rows[name], LENGTH) for name in ("one-token", "one-token-eot"))
    assert all(answer.nfe == LENGTH for answer in whole)
    assert all(answer.nfe < LENGTH for answer in short)
    assert sum(answer.token_forwards for answer in short) < sum(answer.token_forwards for answer in whole) / 2
    assert sum(answer.right for answer in short) >= sum(answer.right for answer in whole) >= 3
