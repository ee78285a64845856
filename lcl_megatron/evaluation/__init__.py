"""Evaluation of encoders: a folder for each task of ``tools/evaluate.py``, with its ``task.py``, and what tasks share.

| where | what |
|---|---|
| ``commands``, ``generation_commands``, ``flags``, ``presets/`` | the command line, and shipped settings |
| ``classification/``, ``retrieval/``, ``probe/``, ``zero_shot/``, ``captioning/``, ``dialogue/`` | the tasks |
| ``encoders/`` | encoders of any library behind one interface |
| ``transfer/`` | what all tasks share: sets of images, the training loop, features, sessions, results |
| ``vision_language/`` | what captioning and dialogue share: a language model that sees |
| ``probes``, ``features``, ``labelled_images`` | k-NN and linear probe of features from any callable |
| ``checkpoint_encoder`` | these probes of the encoder of a training checkpoint: ``tools/probe.py`` |
| ``checkpoint_engine`` | a training checkpoint, opened by one process |
"""
