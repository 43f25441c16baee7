"""The examples in front of the questions. All written for this project; none is taken from a benchmark."""

ARITHMETIC = (
    (
        "A baker has 6 trays with 8 rolls each. He sells 29 rolls in the morning. How many rolls are left?",
        "There are 6 * 8 = 48 rolls. After selling 29, 48 - 29 = 19 are left. The answer is 19.",
    ),
    (
        "Mira saves 4 dollars a week for 9 weeks and then buys a book for 15 dollars. How much money does she still have?",
        "In 9 weeks Mira saves 4 * 9 = 36 dollars. After buying the book she has 36 - 15 = 21 dollars. The answer is 21.",
    ),
    (
        "A train carries 240 passengers. At the first stop a quarter of them get off and 35 get on. How many passengers are on the train then?",
        "A quarter of 240 is 240 / 4 = 60. After they get off, 240 - 60 = 180 are left. With the new ones there are 180 + 35 = 215. The answer is 215.",
    ),
    (
        "Tom is three times as old as his sister, who will be 9 in two years. How old is Tom?",
        "His sister is 9 - 2 = 7 years old now. Tom is 3 * 7 = 21. The answer is 21.",
    ),
    (
        "A garden is 12 meters long and 7 meters wide. A fence costs 5 dollars a meter. What does it cost to fence the whole garden?",
        "The fence is 2 * (12 + 7) = 38 meters long. It costs 38 * 5 = 190 dollars. The answer is 190.",
    ),
    (
        "A shop sells pens in packs of 10 for 4 dollars. Ana needs 70 pens and has 30 dollars. How much does she have left?",
        "Ana needs 70 / 10 = 7 packs. They cost 7 * 4 = 28 dollars. She has 30 - 28 = 2 dollars left. The answer is 2.",
    ),
)

ALGEBRA = (
    (
        "The mean of four numbers is 9. Three of them are 5, 8 and 11. What is the fourth?\nAnswer Choices: (a) 9 (b) 10 (c) 12 (d) 14 (e) 16",
        "The four numbers add up to 4 * 9 = 36. The three known ones add up to 24. The fourth is 36 - 24 = 12. The answer is (c).",
    ),
    (
        "A car covers 150 km in 2.5 hours. How far does it get in 4 hours at the same speed?\n"
        "Answer Choices: (a) 210 km (b) 240 km (c) 250 km (d) 280 km (e) 300 km",
        "Its speed is 150 / 2.5 = 60 km an hour. In 4 hours it covers 4 * 60 = 240 km. The answer is (b).",
    ),
    (
        "If 3x - 7 = 2x + 6, what is x?\nAnswer Choices: (a) 1 (b) 6 (c) 7 (d) 12 (e) 13",
        "Subtracting 2x gives x - 7 = 6, so x = 13. The answer is (e).",
    ),
    (
        "A price of 80 dollars is raised by 25 percent and then cut by 10 percent. What is it then?\n"
        "Answer Choices: (a) 90 (b) 92 (c) 95 (d) 100 (e) 110",
        "Raised by 25 percent it is 80 * 1.25 = 100 dollars. Cut by 10 percent it is 100 * 0.9 = 90 dollars. The answer is (a).",
    ),
)

COMMON_SENSE = (
    (
        "Where would you keep milk so that it does not turn sour?\nAnswer Choices: (a) oven (b) refrigerator (c) bookshelf (d) garage (e) mailbox",
        "Milk turns sour when it is warm, so it has to be kept cold. Of these places only a refrigerator is cold. The answer is (b).",
    ),
    (
        "What does somebody feel who has waited for hours without a reason?\n"
        "Answer Choices: (a) hunger for adventure (b) gratitude (c) pride (d) impatience (e) relief",
        "Who has to wait long without knowing why wants it to end. That feeling is impatience. The answer is (d).",
    ),
    (
        "The hikers crossed the river where it was shallow because there was no what?\n"
        "Answer Choices: (a) bridge (b) tent (c) map (d) waterfall (e) fish",
        "One walks through a river only if one cannot walk over it. What was missing was a bridge. The answer is (a).",
    ),
    (
        "What is a carpenter likely to have in his workshop?\n"
        "Answer Choices: (a) scalpel (b) blackboard (c) saw (d) anchor (e) microscope",
        "A carpenter works with wood, which is cut with a saw. The answer is (c).",
    ),
    (
        "If you want to see the stars clearly, where should you go at night?\n"
        "Answer Choices: (a) city center (b) cinema (c) tunnel (d) stadium (e) desert",
        "Stars are seen best far from lights. A desert has hardly any lights. The answer is (e).",
    ),
)

STRATEGY = (
    (
        "Could a grown giraffe stand upright in a common elevator?",
        "A grown giraffe is four to six meters tall. A common elevator is less than three meters high. So it could not stand upright. The answer is no.",
    ),
    (
        "Did the painter Rembrandt live before the invention of the telephone?",
        "Rembrandt lived in the 17th century. The telephone was invented in the 19th century. So he lived before. The answer is yes.",
    ),
    (
        "Would a bowl of salt dissolve in an empty bathtub?",
        "Salt dissolves in water. An empty bathtub holds no water. So it would not dissolve. The answer is no.",
    ),
    (
        "Can a chess game be finished with both queens still on the board?",
        "A game ends when a king is checkmated, and that can happen while both queens are on the board. So it can. The answer is yes.",
    ),
)

DATE = (
    (
        "Today is March 12, 2014. What is the date tomorrow in MM/DD/YYYY?",
        "The day after March 12 is March 13. So the date tomorrow is 03/13/2014. The answer is 03/13/2014.",
    ),
    (
        "Lea was born on the last day of February 2001. Today is her 16th birthday. What is the date one week ago in MM/DD/YYYY?",
        "2001 was no leap year, so she was born on February 28. Today is 02/28/2017. One week before is 02/21/2017. The answer is 02/21/2017.",
    ),
    (
        "The meeting was planned for 11/02/2018 and was put off by one month. What is the date of the meeting in MM/DD/YYYY?",
        "One month after 11/02/2018 is 12/02/2018. The answer is 12/02/2018.",
    ),
)

SPORTS = (
    (
        'Is the following sentence plausible? "Serena Williams served an ace"',
        "Serena Williams is a tennis player. An ace is served in tennis. So it is plausible. The answer is yes.",
    ),
    (
        'Is the following sentence plausible? "Lionel Messi hit a home run"',
        "Lionel Messi is a soccer player. A home run is hit in baseball. So it is not plausible. The answer is no.",
    ),
    (
        'Is the following sentence plausible? "Wayne Gretzky scored on a power play"',
        "Wayne Gretzky is an ice hockey player. A power play is part of ice hockey. So it is plausible. The answer is yes.",
    ),
)

KNOWLEDGE = (
    (
        "Which of these is a noble gas?\nAnswer Choices: (a) nitrogen (b) argon (c) chlorine (d) hydrogen",
        "The noble gases are helium, neon, argon, krypton, xenon and radon. Of the choices only argon is one. The answer is (b).",
    ),
    (
        "In which organ is bile made?\nAnswer Choices: (a) stomach (b) pancreas (c) kidney (d) liver",
        "Bile is made in the liver and kept in the gallbladder. The answer is (d).",
    ),
    (
        "A good whose demand falls when income rises is called\n"
        "Answer Choices: (a) an inferior good (b) a public good (c) a luxury good (d) a complement",
        "When income rises, people turn from inferior goods to better ones, so the demand for them falls. The answer is (a).",
    ),
)

TRUTH = (
    ("What is the boiling point of water at sea level?", "Water boils at 100 degrees Celsius at sea level."),
    ("Do goldfish forget everything after a few seconds?", "No, goldfish remember things for weeks or months."),
    ("Who wrote the play Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Can you see the wind?", "No, you can only see what the wind moves."),
)

MBPP = (
    (
        "Write a function to add up the squares of a list of numbers.",
        "assert sum_of_squares([1, 2, 3]) == 14",
        "def sum_of_squares(numbers):\n    return sum(n * n for n in numbers)",
    ),
    (
        "Write a function to find the longest word of a sentence.",
        'assert longest_word("a quick brown fox") == "quick"',
        "def longest_word(sentence):\n    return max(sentence.split(), key=len)",
    ),
    (
        "Write a function to remove repeated items of a list and keep their order.",
        "assert unique([3, 1, 3, 2, 1]) == [3, 1, 2]",
        "def unique(items):\n    seen = []\n    for item in items:\n        if item not in seen:\n            seen.append(item)\n"
        "    return seen",
    ),
)
