"""Prompts of three kinds, long enough to choose CSparse's neurons from. All written for this project."""

ARITHMETIC = """Question: A gardener plants 4 rows of 9 tulips. A storm breaks 5 of them. How many tulips are left?
Answer: The gardener plants 4 * 9 = 36 tulips. After the storm 36 - 5 = 31 are left. The answer is 31.

Question: Tom reads 15 pages a day for 6 days and then 20 pages on Sunday. How many pages has he read?
Answer: In six days Tom reads 15 * 6 = 90 pages. With Sunday he has read 90 + 20 = 110 pages. The answer is 110.

Question: A ticket costs 8 dollars for adults and half of that for children. What do 2 adults and 3 children pay?
Answer: A child pays 8 / 2 = 4 dollars. The adults pay 2 * 8 = 16 dollars, the children 3 * 4 = 12 dollars. Together they pay \
16 + 12 = 28 dollars. The answer is 28.

Question: A baker makes 120 rolls, sells three quarters of them in the morning and 20 in the afternoon. How many are left?
Answer: In the morning the baker sells 120 * 3 / 4 = 90 rolls. After that 120 - 90 = 30 are left, and in the afternoon \
30 - 20 = 10. The answer is 10.

Question: A bus has 48 seats. At the first stop 17 people get on, at the second 12 get on and 5 get off. How many seats are free?
Answer:"""

SUMMARY = """Lighthouses were built to guide ships into harbours and past dangerous coasts. The first were open fires on hills, \
later raised on platforms so that they could be seen from further away. The tower of Pharos at Alexandria, finished in the third \
century before our era, was for long among the tallest buildings on earth. In the eighteenth century oil lamps with mirrors took \
the place of coal fires, and in 1822 Augustin Fresnel built a lens of many glass prisms that gathered nearly all of a lamp's \
light into one flat beam that carried more than thirty kilometres. Keepers lived in the towers, trimmed the wicks, wound the \
clockwork that turned the lens and sounded the horn in fog. Electricity, automation and finally satellite navigation made them \
superfluous; most towers still stand, and many are now museums or small hotels.

In short, the text above says that"""

CODE = '''def is_prime(n):
    """Return True if n is a prime number."""
    if n < 2:
        return False
    for d in range(2, int(n ** 0.5) + 1):
        if n % d == 0:
            return False
    return True


def primes_up_to(limit):
    """Return the list of all primes up to and including limit."""
    return [n for n in range(2, limit + 1) if is_prime(n)]


def gcd(a, b):
    """Return the greatest common divisor of a and b."""
    while b:
        a, b = b, a % b
    return a


def prime_factors(n):
    """Return the prime factors of n in rising order, each as often as it divides n."""
'''

# What people ask an assistant.
CHAT = (
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain how a refrigerator works to a ten year old.",
    "Write a short poem about the sea in winter.",
    "Give me three ideas for a birthday party without alcohol.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that reverses the words of a sentence.",
    "How do I remove a coffee stain from a cotton shirt?",
    "Summarize the plot of Romeo and Juliet in four sentences.",
    "List the planets of the solar system with one fact about each.",
    "Why do leaves change their colour in autumn?",
    "Translate into French: The train leaves at seven in the morning.",
    "Write a polite email that asks a landlord to repair the heating.",
    "What should I think of before I adopt a dog?",
    "Explain what a hash table is and when it is slow.",
    "Give me a recipe for pancakes for four people.",
    "What caused the First World War? Answer in a few sentences.",
    "Write a SQL query that counts the orders of every customer.",
    "How can I fall asleep faster?",
    "Tell me a story about a robot that learns to paint.",
    "What is the derivative of x squared times sine of x? Show the steps.",
    "Compare renting and buying a flat.",
    "Write a bash command that finds the ten largest files.",
    "Describe the water cycle.",
    "What are good questions to ask in a job interview?",
)

PROMPTS = {"arithmetic": ARITHMETIC, "summary": SUMMARY, "code": CODE}
