"""Between this model and other libraries' weights, both ways.

| modules | what |
|---|---|
| ``table`` | rules of names and layouts, read in both directions |
| ``timm_vit``, ``clip_vision``, ``opt``, ``whole_model``, ``official`` | a table for each library |
| ``export_targets``, ``tokenizer_json`` | the folders of an export |
| ``stock_tower``, ``stock_clip``, ``stock_open_clip``, ``stock_timm`` | other libraries' vision towers, loaded |
| ``official_file`` | files of the released LCL code, read and written |
| ``importing``, ``positions``, ``parity`` | from any source to a folder of weights, and the proof |
"""
