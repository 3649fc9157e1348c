"""Names of CarperAI's trlx and of other libraries: what they are here. Most of it is tables.

| file | serves |
|---|---|
| imports | imports from paths of CarperAI's trlx, such as ``trlx.data.configs`` |
| functions | its functions that have no successor |
| attributes | its attributes of trainers |
| hooks | its methods that a user's class may override |
| settings | names of settings in TRL, transformers, verl and OpenRLHF |
"""
