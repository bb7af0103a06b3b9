"""PyYAML's safe loader without two of its silences."""

import re

import yaml


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, and whole numbers of base 8 or 60 (010, 1:30)."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the key {twice[0]} stands twice")
        return super().construct_mapping(node, deep)

    def number(self, node):
        if re.match("[-+]?0[0-9_]+$|.*:", self.construct_scalar(node)):
            raise ValueError(f"YAML reads {node.value} as another number; without leading 0 or colon, or in quotes")
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.number)
