-- limit_acquire: jobs join the line of their meter; then the first of the line get tickets, as many as may be asked now.
--
-- KEYS  1 to 11 as _meter says  12 RQ's intermediate list of interactive  13 of batch  then per job: its state
-- ARGV  1 the meter's name  2 requests  3 tokens a window  4 streams at once (0: no limit)  5 interactive's share
--       6 window (ms)  7 lease of a ticket (ms)  8 who asks  9 the number of this call, larger than those before
--       10 how many tickets at most  11 the lanes to serve: 0 interactive, 1 batch ('01', '0', '1')
--       12 what a job waits for, JSON without its closing brace  13 ms until the asker's turn, as it was told (0: it
--       has come, or there is none)  14 number of jobs, then per job:
--       delivery, lane, place (when it was submitted, ms), tokens of the prompt, most tokens of the answer ('': unknown)
-- Returns {waiting, ms until the next may get a ticket (-1: nobody waits), ms until the asker's turn to ask, why, granted
-- 'DELIVERY:TOKENS ...', too large 'DELIVERY:TOKENS ...'}. Granted deliveries may be others than those that joined: who
-- comes first goes first. A delivery is its own ticket. All of a request is granted, or nothing; who waits has used nothing.
-- Too large may be some of the line, too, after a limit was lowered: they have left it, to be counted anew.
-- A job that stays in line says so in its state, and its delivery leaves the intermediate list for the line; from the
-- line it comes back into the list.
-- Interactive goes first, but of twenty tickets one is batch's when both wait, whoever serves which of them.
-- A lost reply may be retried: the last answer to each asker is kept for a minute. A call that comes later than a newer
-- one of its asker does nothing: nobody waits for its tickets any more.
-- flags: allow-oom
-- uses: _meter

local SERVED = 2500 -- ms: within which workers that may serve a line have looked, and asked
local REPLIES, asker, number = KEYS[8], ARGV[8], ARGV[9]
local before = call('HGET', REPLIES, asker)
local last = before and tonumber(string.match(before, '^%d+')) or 0
if last > tonumber(number) then
  return {0, -1, 0, '', '', ''}
elseif last == tonumber(number) then
  local waiting, wait, turn, why, granted, large =
    string.match(before, '^[^|]*|([^|]*)|([^|]*)|([^|]*)|([^|]*)|([^|]*)|(.*)$')
  return {tonumber(waiting), tonumber(wait), tonumber(turn), why, granted, large}
end

local name, window, lease = ARGV[1], tonumber(ARGV[6]), tonumber(ARGV[7])
local want, jobs = tonumber(ARGV[10]), tonumber(ARGV[14])
open_meter(window)
set_limits(name, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]))

local joined, large, new, taken = {}, {}, {[0] = 0, 0}, {}
for i = 1, jobs do
  local from = 10 + 5 * i
  local delivery, lane, tokens = ARGV[from], tonumber(ARGV[from + 1]), cost_of(ARGV[from + 3], ARGV[from + 4])
  local member = delivery .. ':' .. int(tokens)
  taken[delivery] = true
  if m.tpm > 0 and tokens > m.tpm then
    large[#large + 1] = member
  elseif call('ZADD', LINES[lane], ARGV[from + 2], member) == 1 then
    m.behind = m.behind + tokens
    new[lane] = new[lane] + 1
    joined[#joined + 1] = {member, lane, delivery, KEYS[13 + i]}
  end
end

local rpm, tpm = limits()
local stepping, gap, step = false, 0, 0 -- of the lane looked at last: whether tickets are spaced, by how much, the next
local waits = {[0] = call('ZCARD', LINES[0]), call('ZCARD', LINES[1])}
local heads = {}
local function tokens_of(member)
  return tonumber(string.match(member, '%d+$'))
end
local function leave(lane, member)
  local delivery = string.match(member, '^(.*):%d+$')
  if not taken[delivery] then -- until the asker has booked it, RQ finds it where it finds all that a dead worker took
    call('RPUSH', KEYS[12 + lane], delivery)
  end
  call('ZREM', LINES[lane], member)
  waits[lane] = waits[lane] - 1
  heads[lane] = nil
  m.behind = m.behind - tokens_of(member)
  want = want - 1
  return delivery
end
local function head(lane)
  while want > 0 and not heads[lane] and waits[lane] > 0 and string.find(ARGV[11], lane, 1, true) do
    local member = call('ZRANGE', LINES[lane], 0, 0)[1]
    if m.tpm > 0 and tokens_of(member) > m.tpm then -- the limit was lowered meanwhile
      large[#large + 1] = member
      leave(lane, member)
    else
      heads[lane] = member
    end
  end
  return heads[lane]
end

-- Requests again within an attempt go before the line, those of rows before rows; a place lapses with its score.
local places = call('ZCARD', FRONT) > 0
local chats = places and call('ZCOUNT', FRONT, '(' .. int(now), '+inf') > 0
local front = {[0] = chats, chats or places and call('ZCOUNT', FRONT, '-inf', '(' .. int(-now)) > 0}

-- Whether rows are to let chats go first that others serve, who asked within the last seconds.
local chatting = string.find(ARGV[11], '0', 1, true)
local function yields()
  return not chatting and waits[0] > 0 and m.streak < 19 and math.abs(now - m.served) < SERVED
end
if chatting and waits[0] > 0 and math.abs(now - m.served) >= TOGETHER then
  call('HSET', METER, 'served', int(now))
end

-- May the first of this lane have its ticket now: nil, or why not, and when to ask for it.
local function refused(lane, tokens)
  stepping, gap = false, 0
  if front[lane] then
    return 'requests', now + width
  end
  local why, at, requests_left, tokens_left = blocked(lane, tokens, rpm, tpm)
  stepping = requests_left and (waits[lane] > requests_left or waits[lane] * tokens > tokens_left)
  if stepping then
    local measure
    gap, measure = spacing(lane, tokens, rpm, tpm)
    step = min(m.step, now) + gap -- the clock may have gone back
    if not why and now < step then
      return measure, math.ceil(step)
    end
  end
  return why, at
end

local granted, why, at, foreign = {}, '', nil, false
while want > 0 do
  local chat, row = head(0), head(1)
  if want <= 0 then
    break
  end
  local lane = chat and not (row and m.streak >= 19) and 0 or 1
  local member = head(lane)
  if not member or yields() then
    foreign = waits[0] + waits[1] > 0 -- who waits is of a lane that others serve
    break
  end
  local tokens = tokens_of(member)
  why, at = refused(lane, tokens)
  if why and lane == 1 and chat then -- its turn has come, its share is used up
    lane, member = 0, chat
    tokens = tokens_of(member)
    why, at = refused(lane, tokens)
  end
  if why then
    break
  end
  if stepping then
    m.step = max(step, now - max(TURN, TOGETHER - gap)) -- who comes late is not late for ever
  end
  local delivery = leave(lane, member)
  m.streak = lane == 0 and waits[1] > 0 and m.streak + 1 or 0
  grant(delivery, lane, tokens, lease)
  granted[#granted + 1] = member
end

local waiting = waits[0] + waits[1]
local wait, turn = -1, 0
if waiting > 0 then
  at = at or now
  wait = max(0, at - now)
  local others = false -- wait in a lane that is not the asker's: when they are due is for others to say
  for lane = 0, 1 do
    others = others or waits[lane] > 0 and not string.find(ARGV[11], lane, 1, true)
  end
  local first = call('ZADD', WAITING, others and now or at, name) == 1
  if first or keep then
    call('PEXPIRE', WAITING, KEPT)
  end
  for lane = 0, 1 do
    if waits[lane] > 0 and (first or keep or new[lane] >= waits[lane]) then -- the last: a line that begins
      call('PEXPIRE', LINES[lane], KEPT)
    end
  end
  if foreign then
    wait, turn = 1000, 1000
  elseif wait > 0 then
    turn = tonumber(ARGV[13])
    if turn < wait or turn > wait + LATEST then
      local mine = max(at, m.turn)
      mine = mine > at + LATEST and at or mine -- the turns given out are more than a second's, or of another time
      m.turn = mine + max(gap, TURN)
      turn = mine - now
    end
  end
else
  m.behind = 0
  call('ZREM', WAITING, name)
end

-- When a place is due, about: by requests, by tokens, whichever takes longer.
local function due(lane, rank)
  local share = lane == 1 and 1 - m.share or 1
  local ahead = 0
  if rpm > 0 then
    ahead = (rank + lane * waits[0]) / max(1, rpm * share) * m.window
  end
  if tpm > 0 then
    ahead = max(ahead, m.behind * (rank + 1) / max(1, waiting) / max(1, tpm * share) * m.window)
  end
  return int(max(at or now, now + ahead))
end

for _, job in ipairs(joined) do
  local member, lane, delivery, state = unpack(job)
  local rank = call('ZRANK', LINES[lane], member)
  if rank then
    call('LREM', KEYS[12 + lane], 1, delivery)
    local status = call('HGET', state, 'status')
    if status == 'in_progress' then -- its worker is lost, perhaps: while it stands here nobody need deliver it again
      call('HSET', state, 'line', LINES[lane], 'place', member)
    elseif status == 'queued' then
      call('HSET', state, 'wait', ARGV[12] .. ',"because":"' .. (why or 'requests') .. '"}', 'until', due(lane, rank),
        'line', LINES[lane], 'place', member)
    end
  end
end

if keep then
  m.kept = now
end
save_meter(lease)
local reply = {waiting, wait, turn, why or '', table.concat(granted, ' '), table.concat(large, ' ')}
call('HSET', REPLIES, asker, table.concat({number, waiting, wait, turn, reply[4], reply[5], reply[6]}, '|'))
if not before or keep then
  call('PEXPIRE', REPLIES, max(60000, window))
end
return reply
