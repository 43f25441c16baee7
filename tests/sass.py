"""A kernel's machine code, as `cuobjdump -sass` prints it: its loops, and what they hold."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    """text: without the predicate; code: its name with what modifies it, as LDG.E.128."""

    address: int
    predicate: str
    text: str

    @property
    def code(self) -> str:
        return self.text.split()[0]

    @property
    def target(self) -> int | None:
        found = re.search(r"\b(?:BRA|BSSY|CALL)\S*\s.*?0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None

    def registers(self, written: bool) -> set[int]:
        """The general registers that a load writes (its first operand), or those that an instruction names after its first."""
        operands = self.text.split(None, 1)[1].split(",") if " " in self.text else []
        named = operands[:1] if written else operands[1:]
        width = 4 if ".128" in self.code else 2 if ".64" in self.code else 1
        if not written:
            width = 1
        return {int(number) + i for operand in named for number in re.findall(r"\bR(\d+)\b", operand) for i in range(width)}


def kernels(listing: str) -> dict[str, list[Instruction]]:
    """By the kernel's mangled name."""
    out: dict[str, list[Instruction]] = {}
    instructions: list[Instruction] = []
    for line in listing.splitlines():
        if found := re.match(r"\s*Function : (\w+)", line):
            instructions = out.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+) )?\s*(\S.*?)\s*;", line):
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3]))
    return out


def loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Every loop: all instructions from which control comes back to its head without leaving it, in order of the addresses."""
    at = {instruction.address: i for i, instruction in enumerate(instructions)}
    count = len(instructions)
    following: list[list[int]] = [[] for _ in range(count)]
    joins: dict[str, int] = {}  # where who waits for other lanes at a barrier goes on
    for i, instruction in enumerate(instructions):
        name, words = instruction.code.split(".")[0], instruction.text.replace(",", "").split()
        if name == "BSSY" and instruction.target in at:
            joins[words[1]] = at[instruction.target]
        if name == "BSYNC" and words[1] in joins:
            following[i].append(joins[words[1]])
            continue
        # Where lanes that should be together are not, they are brought together elsewhere: that is not looked at.
        # On sm_80 a loop is left by what is a call by its name, but comes back from nowhere.
        branches = name == "BRA" and ".DIV" not in instruction.code or name == "CALL" and instruction.predicate
        if branches and instruction.target in at:
            following[i].append(at[instruction.target])
        always = not instruction.predicate and not re.match(r"\S+ !?U?P\d", instruction.text)
        if i + 1 < count and not (name in ("EXIT", "RET", "BRX", "BRA") and always and ".DIV" not in instruction.code):
            following[i].append(i + 1)
    dominators = _dominators(following)
    preceding: list[list[int]] = [[] for _ in range(count)]
    for i, others in enumerate(following):
        for other in others if dominators[i] >= 0 else ():
            preceding[other].append(i)
    bodies: dict[int, set[int]] = {}
    for i, others in enumerate(following):
        for head in others:
            if head <= i and head in _chain(dominators, i):  # the way back
                body = bodies.setdefault(head, {head})
                waiting = [i]
                while waiting:
                    j = waiting.pop()
                    if j not in body:
                        body.add(j)
                        waiting += preceding[j]
    return [[instructions[i] for i in sorted(body)] for body in bodies.values()]


def _dominators(following: list[list[int]]) -> list[int]:
    """Of each instruction the nearest one that every way to it goes through; -1 for what is never reached."""
    order, seen, stack = [], {0}, [(0, iter(following[0]))]
    while stack:
        node, others = stack[-1]
        for other in others:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(following[other])))
                break
        else:
            stack.pop()
            order.append(node)
    number = {node: i for i, node in enumerate(order)}
    preceding: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for other in following[node]:
            preceding[other].append(node)
    nearest = [-1] * len(following)
    nearest[0] = 0
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [other for other in preceding[node] if nearest[other] >= 0]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while number[best] < number[other]:
                        best = nearest[best]
                    while number[other] < number[best]:
                        other = nearest[other]
            if nearest[node] != best:
                nearest[node], changed = best, True
    return nearest


def _chain(nearest: list[int], node: int) -> set[int]:
    out = set()
    while nearest[node] >= 0 and node not in out:
        out.add(node)
        node = nearest[node]
    return out
