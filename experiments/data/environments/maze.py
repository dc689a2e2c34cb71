"""A way through a maze."""

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

MOVES = {b"D": (1, 0), b"L": (0, -1), b"R": (0, 1), b"U": (-1, 0)}
Cell = tuple[int, int]  # row and column


class Maze(Environment):
    """A square of open cells and walls, row by row, from S to G, `S.#/#../#.G:`; the answer is moves, `RDDR`.

    Every walk on open cells that ends at G is right unless it is longer than the shortest could be in any maze; the
    answer of a problem is a shortest one. An attempt has the moves that would do without walls, in random order.

    Args:
        size: cells of a side, at least 2.
        walls: chance that a cell is one, below 1.
        moves: fewest moves of a shortest way; mazes that need fewer are not asked.
    """

    alphabet = b"#./:DGLRSU"

    def __init__(self, size: int = 4, walls: float = 0.3, moves: int = 4):
        if size < 2 or not 0 <= walls < 1 or not 1 <= moves <= 2 * size - 2:
            raise ValueError(
                f"size={size} must be at least 2, walls={walls} from 0 to below 1, and moves={moves} from 1 to the "
                f"{2 * size - 2} from corner to corner"
            )
        self.size, self.walls, self.moves = size, walls, moves
        self.name = f"maze-{size}-{walls:g}-{moves}"
        self.longest = size * (size + 1), size * size - 1

    def problem(self, random: np.random.Generator) -> Problem:
        while True:
            cells = np.where(random.random((self.size, self.size)) < self.walls, b"#", b".")
            places = [(r, c) for r in range(self.size) for c in range(self.size)]
            goal = places[random.integers(len(places))]
            cells[goal] = b"G"
            distance = _distances({place for place in places if cells[place] != b"#"}, goal)
            if starts := [place for place in distance if distance[place] >= self.moves]:
                start = starts[random.integers(len(starts))]
                cells[start] = b"S"
                prompt = b"/".join(map(b"".join, cells.tolist())) + b":"
                return Problem(prompt, _shortest(distance, start, random))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        _, start, goal = _read(prompt)
        down, right = goal[0] - start[0], goal[1] - start[1]
        moves = b"DU"[down < 0 :][:1] * abs(down) + b"RL"[right < 0 :][:1] * abs(right)
        return bytes(random.permutation(list(moves)).tolist())

    def check(self, prompt: bytes, answer: bytes) -> float:
        cells, here, goal = _read(prompt)
        for byte in answer:
            if (move := bytes([byte])) not in MOVES or (here := _moved(here, move)) not in cells:
                return 0.0
        return float(here == goal and len(answer) <= self.longest[1])


def _read(prompt: bytes) -> tuple[set[Cell], Cell, Cell]:
    """Returns the open cells, S and G."""
    rows = prompt.rstrip(b":").split(b"/")
    at = {(r, c): kind for r, row in enumerate(rows) for c, kind in enumerate(row) if kind != ord("#")}
    start, goal = (next(cell for cell, kind in at.items() if kind == ord(end)) for end in "SG")
    return set(at), start, goal


def _moved(cell: Cell, move: bytes) -> Cell:
    down, right = MOVES[move]
    return cell[0] + down, cell[1] + right


def _distances(cells: set[Cell], goal: Cell) -> dict[Cell, int]:
    """Returns the moves of the shortest walk to the goal from every open cell that has one."""
    distance, border = {goal: 0}, [goal]
    for cell in border:  # grows behind the loop: breadth first
        for move in MOVES:
            if (other := _moved(cell, move)) in cells and other not in distance:
                distance[other] = distance[cell] + 1
                border.append(other)
    return distance


def _shortest(distance: dict[Cell, int], start: Cell, random: np.random.Generator) -> bytes:
    """Returns the moves of a shortest walk; at each step, all moves that lie on one are as likely."""
    path, here = b"", start
    while distance[here]:
        nearer = [move for move in MOVES if distance.get(_moved(here, move)) == distance[here] - 1]
        path += nearer[random.integers(len(nearer))]
        here = _moved(here, path[-1:])
    return path
