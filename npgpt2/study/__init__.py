"""Looking at what a model does: a forward pass that is watched, scores of texts, and the page that shows both.

Nothing here generates, and the page (`npgpt2.study.report`) is imported only by who asks for one.
"""
